"""Pixels: which files are pictures, what training sees of them, and the sheets that show them."""
