"""What is learned: the adapter, its file, and wearing it."""
