"""Pictures of nothing but small things: what a VAE must learn to keep, and subjects alone teach too seldom.

Flowers of a few pixels, dots, stripes, thin lines, checks and scribbles in saturated colours, on saturated colours.
"""

import math
from random import Random

from experiments.tiny_base.palette import INK, to_hex
from experiments.tiny_base.shapes import document

SIZE = 128


def random_details(rng: Random) -> str:
    """An SVG document, 128 x 128, opaque."""
    drawn = [f'<rect width="{SIZE}" height="{SIZE}" fill="{_colour(rng)}"/>']
    for _ in range(rng.randint(1, 3)):
        drawn.append(_patch(rng))
    for _ in range(rng.randint(8, 26)):
        x, y = rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        drawn.append(
            rng.choice((_flower, _flower, _dot, _ring, _star, _line, _line, _scribble, _stripes, _checks))(rng, x, y)
        )
    return document("".join(drawn))


def _colour(rng: Random) -> str:
    """Any colour, every other one saturated."""
    channels = [rng.randint(0, 255) for _ in range(3)]
    if rng.random() < 0.5:
        low, high = rng.sample(range(3), 2)
        channels[low], channels[high] = rng.randint(0, 60), rng.randint(200, 255)
    return to_hex(channels)


def _ink(rng: Random) -> str:
    """Most outlines are ink, some are coloured, some are missing."""
    kind = rng.random()
    if kind < 0.2:
        return ""
    return f'stroke="{INK if kind < 0.75 else _colour(rng)}" stroke-width="{rng.uniform(0.7, 3):.1f}"'


def _patch(rng: Random) -> str:
    """A large blot of colour, so that edges meet small things."""
    x, y, r, s = (rng.uniform(0, SIZE) for _ in range(4))
    turn = rng.uniform(0, 180)
    return (
        f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{10 + r / 2:.1f}" ry="{10 + s / 2:.1f}" '
        f'fill="{_colour(rng)}" transform="rotate({turn:.0f} {x:.1f} {y:.1f})" {_ink(rng)}/>'
    )


def _flower(rng: Random, x: float, y: float) -> str:
    petals, size, petal = rng.randint(4, 7), rng.uniform(2, 8), _colour(rng)
    turn, ink = rng.uniform(0, math.tau), _ink(rng)
    around = (turn + i * math.tau / petals for i in range(petals))
    drawn = [_circle(x + size * math.cos(a), y + size * math.sin(a), size * 0.8, petal, ink) for a in around]
    return "".join(drawn) + _circle(x, y, size * 0.6, _colour(rng), ink)


def _dot(rng: Random, x: float, y: float) -> str:
    return _circle(x, y, rng.uniform(1, 6), _colour(rng), _ink(rng))


def _ring(rng: Random, x: float, y: float) -> str:
    width = rng.uniform(0.8, 3)
    return _circle(x, y, rng.uniform(3, 14), "none", f'stroke="{_colour(rng)}" stroke-width="{width:.1f}"')


def _star(rng: Random, x: float, y: float) -> str:
    points, size, turn = rng.randint(4, 6), rng.uniform(3, 10), rng.uniform(0, math.tau)
    corners = " ".join(
        f"{x + r * math.cos(a):.1f},{y + r * math.sin(a):.1f}"
        for i in range(2 * points)
        for r, a in [(size if i % 2 else size * 0.45, turn + i * math.pi / points)]
    )
    return f'<polygon points="{corners}" fill="{_colour(rng)}" {_ink(rng)}/>'


def _line(rng: Random, x: float, y: float) -> str:
    bend = " ".join(f"{v + rng.uniform(-40, 40):.1f}" for v in (x, y, x, y))
    return _stroke(rng, f"M{x:.1f} {y:.1f} Q{bend}", rng.uniform(0.6, 3.2))


def _scribble(rng: Random, x: float, y: float) -> str:
    """Strokes as small as letters."""
    steps = "".join(f"L{x + rng.uniform(-8, 8):.1f} {y + rng.uniform(-8, 8):.1f}" for _ in range(rng.randint(2, 5)))
    return _stroke(rng, f"M{x:.1f} {y:.1f}{steps}", rng.uniform(0.6, 2.2))


def _stripes(rng: Random, x: float, y: float) -> str:
    gap, long, count = rng.uniform(2.5, 7), rng.uniform(8, 30), rng.randint(3, 7)
    lines = "".join(f"M{x:.1f} {y + i * gap:.1f}h{long:.1f}" for i in range(count))
    return f'<g transform="rotate({rng.uniform(0, 180):.0f} {x:.1f} {y:.1f})">{_stroke(rng, lines, gap / 2)}</g>'


def _checks(rng: Random, x: float, y: float) -> str:
    cell, across, turn = rng.uniform(2.5, 6), rng.randint(3, 6), rng.uniform(0, 90)
    squares = "".join(
        f"M{x + i * cell:.1f} {y + j * cell:.1f}h{cell:.1f}v{cell:.1f}h-{cell:.1f}z"
        for i in range(across)
        for j in range(across)
        if (i + j) % 2
    )
    return f'<path d="{squares}" fill="{_colour(rng)}" transform="rotate({turn:.0f} {x:.1f} {y:.1f})"/>'


def _circle(x: float, y: float, r: float, fill: str, ink: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{fill}" {ink}/>'


def _stroke(rng: Random, path: str, width: float) -> str:
    return f'<path d="{path}" fill="none" stroke="{_colour(rng)}" stroke-width="{width:.1f}" stroke-linecap="round"/>'
