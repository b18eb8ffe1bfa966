"""The frozen base model: where it lies, how it is loaded, and how it encodes images and captions."""
