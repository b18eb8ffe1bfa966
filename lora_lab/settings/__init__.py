"""Every setting: its type, default, bounds, meaning, and what it decides."""
