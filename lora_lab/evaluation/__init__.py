"""How good a LoRA is, measured on the images that it renders."""
