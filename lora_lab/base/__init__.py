"""The frozen model: where it lies, how it is loaded, and what it makes of pictures and captions."""
