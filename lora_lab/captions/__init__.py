"""Captions: their files, captioners that write them, and refiners that put the trigger in."""
