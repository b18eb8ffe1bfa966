"""Colours by name, and what small changes of them are still called by that name."""

from random import Random

# sRGB, 0 to 255. Whole pictures are filled with these.
BACKGROUNDS = {
    "red": (214, 64, 64),
    "orange": (240, 140, 60),
    "yellow": (246, 214, 84),
    "green": (92, 178, 104),
    "teal": (64, 176, 172),
    "blue": (72, 120, 216),
    "sky blue": (150, 205, 245),
    "purple": (150, 100, 205),
    "pink": (245, 160, 195),
    "white": (248, 248, 248),
    "black": (34, 34, 40),
    "gray": (150, 150, 156),
    "brown": (130, 88, 58),
    "beige": (236, 222, 192),
}

# Bodies, hats, shirts and marks.
COATS = {
    "red": "#d94343",
    "blue": "#3d6fd6",
    "green": "#49a85a",
    "yellow": "#f2c53d",
    "orange": "#ef8636",
    "purple": "#8050c8",
    "pink": "#f285b5",
    "white": "#f7f7f5",
    "black": "#2d2d35",
    "teal": "#2fa8a0",
    "brown": "#8a5a36",
    "gray": "#a3a3ab",
}

HAIRS = {
    "black": "#2b2430",
    "brown": "#6b4226",
    "blond": "#efc75e",
    "red": "#c23b2e",
    "ginger": "#e2803c",
    "gray": "#a9a9b2",
    "white": "#f3f3f3",
    "blue": "#3f6fd8",
    "pink": "#f08bb5",
    "green": "#3fa36b",
    "purple": "#7d4fc4",
}

SKINS = {"light": "#f9d3b8", "tan": "#dfa476", "brown": "#a9683f", "dark": "#6b4028"}

INK = "#2a2230"
WHITE = "#ffffff"
GOLD = "#f7dc5a"


def vary(colour: str, rng: Random, by: int = 8) -> str:
    """A colour "#rrggbb" moved by at most `by` of 255 in each channel."""
    return to_hex([channel + rng.randint(-by, by) for channel in to_rgb(colour)])


def shade(colour: str, factor: float = 0.78) -> str:
    """A darker "#rrggbb"."""
    return to_hex([channel * factor for channel in to_rgb(colour)])


def to_rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def to_hex(channels: list[float]) -> str:
    return "#" + "".join(f"{max(0, min(255, int(channel))):02x}" for channel in channels)


def background(rng: Random) -> tuple[str, tuple[int, int, int]]:
    """A background's name, and a colour that still bears it."""
    name = rng.choice(list(BACKGROUNDS))
    return name, tuple(max(0, min(255, channel + rng.randint(-12, 12))) for channel in BACKGROUNDS[name])
