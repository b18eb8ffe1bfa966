"""DiceBear's avatars, as dicebear/draw.mjs draws them: read, brought into a frame and set in a random pose."""

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from math import radians, sin
from pathlib import Path
from random import Random

from experiments.tiny_base.dicebear import looks
from experiments.tiny_base.shapes import document
from experiments.tiny_base.vocabulary import Look


@dataclass(frozen=True)
class Style:
    describe: Callable[[looks.Attributes], Look]
    frame: tuple[float, float, float]  # left, top and size of the square that is shown, in the style's own units
    bust: bool = True  # whether it stands on the picture's lower border; else a head that floats


STYLES = {
    "personas": Style(looks.personas, frame=(2, 0, 60)),
    "big-smile": Style(looks.big_smile, frame=(-40, -65, 560), bust=False),
    "micah": Style(looks.micah, frame=(-15, -30, 390)),
    "toon-head": Style(looks.toon_head, frame=(-66, -100, 900)),
    "miniavs": Style(looks.miniavs, frame=(-12, -6, 84)),
    "dylan": Style(looks.dylan, frame=(-4, -5, 90), bust=False),
    "fun-emoji": Style(looks.fun_emoji, frame=(-5, -5, 210), bust=False),
    # Not in the training data.
    "avataaars": Style(looks.avataaars, frame=(-10, -20, 300)),
}


def read(path: str | Path) -> list[str]:
    """The lines of a file by draw.mjs, which may be compressed (.xz)."""
    data = Path(path).read_bytes()
    if Path(path).suffix == ".xz":
        data = lzma.decompress(data)
    return data.decode().splitlines()


def random_avatar(line: str, rng: Random) -> tuple[str, Look]:
    """The avatar of one line in a random pose: its SVG document, 128 x 128, and what can be said of it."""
    avatar = json.loads(line)
    style = STYLES[avatar["style"]]
    elements = _posed(_framed(avatar["svg"], style.frame), style.bust, rng)
    return document(elements), style.describe(avatar["attributes"])


def _framed(svg: str, frame: tuple[float, float, float]) -> str:
    """What a document of DiceBear's shows in a frame, as elements of 128 x 128."""
    left, top, size = frame
    fit = f"scale({128 / size:.5g}) translate({-left} {-top})"
    elements = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    return f'<g fill="none" transform="{fit}">{elements}</g>'


def _posed(elements: str, bust: bool, rng: Random) -> str:
    """Elements of 128 x 128 a little turned, scaled and moved."""
    turn = rng.uniform(-6, 6)
    dx = rng.uniform(-5, 5)
    if bust:
        x, y = 64, 128
        scale = rng.uniform(0.86, 1)
        dy = 56 * sin(radians(abs(turn)))  # else one end of the shoulders would be lifted off the lower border
    else:
        x, y = 64, 64
        scale = rng.uniform(0.8, 1)
        dy = rng.uniform(-5, 5)
    move = f"translate({x + dx:.2f} {y + dy:.2f}) rotate({turn:.2f}) scale({scale:.3f}) translate({-x} {-y})"
    return f'<g transform="{move}">{elements}</g>'
