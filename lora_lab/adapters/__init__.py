"""The adapter: inject it into the base, attach it from a file, and the file."""
