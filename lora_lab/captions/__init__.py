"""Text: caption files, the captioner, and the rules that bring its captions to the character."""
