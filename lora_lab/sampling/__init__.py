"""Sample images: from text, from a photo, with a LoRA or by the base alone."""
