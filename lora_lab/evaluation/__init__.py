"""How good a LoRA is, read from the pictures that it draws."""
