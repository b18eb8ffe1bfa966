"""Many runs by one command: which points are tried, what their jobs leave behind, and how a sweep goes on."""
