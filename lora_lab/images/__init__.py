"""Images: which files of a folder are read, the pixels that training sees, and contact sheets."""
