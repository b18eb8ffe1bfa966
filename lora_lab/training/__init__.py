"""Learning: counted randomness, the loss, the loop, and what a checkpoint holds."""
