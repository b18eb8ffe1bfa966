"""Teach Stable Diffusion XL one character from a few pictures, then turn photos into it."""

__version__ = "0.1.0"
