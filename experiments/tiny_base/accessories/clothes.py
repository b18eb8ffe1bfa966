"""On the body: a shirt, and marks, which are worn at the neck, put on like a badge, or cover it with a pattern."""

from random import Random

from experiments.tiny_base.bodies import Body
from experiments.tiny_base.palette import GOLD, shade
from experiments.tiny_base.shapes import Box, Point, circle, heart, line, path, placed, ring, spots, star
from experiments.tiny_base.vocabulary import Look


def _neck(body: Body) -> float:
    """The y of what is worn below the mouth: lower on the body there may be no room."""
    _, y, scale = body.face
    bottom = 104 if body.feet is None else body.feet
    return min(y + 28 * scale, bottom - 5)


def shirt(colour: str, body: Body) -> str:
    """All below a round neckline under the mouth; to be clipped to the body's inside."""
    x, y, scale = body.face
    left, right, side, middle = x - 34 * scale, x + 34 * scale, y + 5 * scale, _neck(body) - 4
    neckline = f"M-20 {side:.1f} L{left:.1f} {side:.1f} Q{x} {2 * middle - side:.1f} {right:.1f} {side:.1f} H148"
    return path(f"{neckline} V148 H-20Z", colour)


def mark(kind: str, colour: str, look: Look, body: Body, rng: Random) -> tuple[str, str]:
    """What is to be clipped to the body's inside, and what lies over the body uncut. `rng` draws where it is."""
    x, y, scale = body.face
    neck = x, _neck(body), scale
    match kind:
        case "dots":
            return _dots(colour, rng), ""
        case "stripes":
            return _stripes(colour, rng), ""
        case "scarf":
            band, end = _scarf(colour)
            return placed(band, *neck), placed(end, *neck)
        case "bow tie":
            return "", placed(_bow_tie(colour), *neck)
        case "flower" | "heart" | "star":
            sideways, down = rng.choice(_badge_places(look, body))
            place = f"translate({x + sideways * scale:.1f} {y + down * scale:.1f}) rotate({rng.uniform(-15, 15):.0f})"
            return "", f'<g transform="{place}">{_BADGES[kind](colour)}</g>'
    raise ValueError(f"no such mark: {kind}")


def _badge_places(look: Look, body: Body) -> list[Point]:
    """Beside the mouth, or where the head is wide and bare, above an eye."""
    beside_mouth = [(-21, 18), (21, 18)]
    above_eyes = [(-21, -20), (21, -20)]
    bare = not look.hair and not look.hat and body.top[1] >= 22
    return beside_mouth + above_eyes if bare else beside_mouth


def _flower(colour: str) -> str:
    return ring(0, 0, 5.4, 4.4, 5, colour) + circle(0, 0, 3, GOLD)


_BADGES = {
    "flower": _flower,
    "heart": lambda colour: path(heart(0, 0, 8.5), colour),
    "star": lambda colour: path(star(0, 0, 10.5, 4.8), colour),
}


def _dots(colour: str, rng: Random) -> str:
    step = 14
    left, top = rng.uniform(0, step), rng.uniform(0, step)
    places = [
        (round(left + step * column + step / 2 * (row % 2), 1), round(top + step * row * 0.87, 1), 4, 4)
        for row in range(10)
        for column in range(-1, 9)
    ]
    return spots(colour, *places)


def _stripes(colour: str, rng: Random) -> str:
    top, angle = rng.uniform(-40, -26), rng.choice((0, 0, -30, 30, 90))
    bands = " ".join(f"M-40 {top + 15 * i:.1f} H168" for i in range(14))
    return f'<g transform="rotate({angle} 64 64)">{line(bands, colour, 6.5)}</g>'


def _bow_tie(colour: str) -> str:
    return path("M0 0 L-17 -8 L-17 8Z M0 0 L17 -8 L17 8Z", colour) + circle(0, 0, 3.6, shade(colour))


def _scarf(colour: str) -> tuple[str, str]:
    """The band around the body, wider than any, and the end that hangs from it."""
    band = path("M-70 -20 L-40 -17 Q0 6 40 -17 L70 -20 V-9 L40 -6 Q0 17 -40 -6 L-70 -9Z", colour)
    stripe = line("M11 6 L24 3", shade(colour, 0.6), 2.4)
    return band, path("M8 -6 L20 -10 L26 12 L13 15Z", colour) + stripe


def scarf_box(body: Body) -> Box:
    """Around the hanging end alone: the band is within the body."""
    x, y, scale = body.face[0], _neck(body), body.face[2]
    return x, y, x + 27 * scale, y + 16 * scale
