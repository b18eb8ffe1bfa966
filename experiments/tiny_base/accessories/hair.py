"""Hair, drawn for a head that is 32 wide to either side at its eyes."""

from experiments.tiny_base.bodies import Body
from experiments.tiny_base.palette import INK, shade
from experiments.tiny_base.shapes import Box, circle, ellipse, line, path, placed


def draw(kind: str, colour: str, body: Body) -> tuple[str, str]:
    """SVG elements of one of vocabulary.HAIR in a colour "#rrggbb": behind the whole body, and in front of it."""
    back, front = _HAIR[kind](colour)
    anchor = _anchor(body)
    return placed(back, *anchor), placed(front, *anchor)


def box(kind: str, body: Body) -> Box:
    """Around all of the hair, before and behind."""
    x, y, scale = _anchor(body)
    half_width, height, length = _SIZES[kind]
    return x - scale * half_width, y - scale * height, x + scale * half_width, y + scale * length


def _anchor(body: Body) -> tuple[float, float, float]:
    # The eyes are between the head's top and the arms, and so is the head's width there.
    y, half_width = body.top
    return body.face[0], y, max(0.75, (0.6 * half_width + 0.55 * body.arms[0]) / 32)


_SIZES = {  # half the width, the height above the head's top, the length below it
    "short": (35, 11, 26),
    "long": (43, 12, 66),
    "wavy": (48, 12, 64),
    "curly": (42, 22, 26),
    "spiky": (38, 26, 26),
    "bob": (43, 12, 44),
    "bun": (35, 32, 26),
    "mohawk": (17, 31, 12),
    "ponytail": (58, 18, 56),
    "braids": (46, 12, 66),
}

_OVER = "C-34 -2 -20 -9 0 -9 C20 -9 34 -2"  # over the head from its right side to its left one


def _strands(d: str, colour: str) -> str:
    return line(d, shade(colour, 0.6), 1.8)


def _smooth(colour: str) -> str:
    """Hair combed back, as under a bun or a ponytail."""
    cap = path(f"M-32 24 {_OVER} 32 24 C28 9 14 4 0 4 C-14 4 -28 9 -32 24Z", colour)
    return cap + _strands("M-17 2 Q-12 -4 -4 -6 M17 2 Q12 -4 4 -6", colour)


def _parted(colour: str, length: float) -> str:
    """Hair parted in the middle, its locks falling down both sides of the face."""
    tip = length - 2
    d = (
        f"M-34 {length} C-38 0 -24 -10 0 -10 C24 -10 38 0 34 {length} Q29 {length + 3} 26 {tip} "
        f"C30 22 27 12 14 9 C8 7 3 4 0 -1 C-3 4 -8 7 -14 9 C-27 12 -30 22 -26 {tip} Q-29 {length + 3} -34 {length}Z"
    )
    return path(d, colour)


def _short(colour: str) -> tuple[str, str]:
    fringe = "C30 15 25 10 17 5 L12 11 L6 5 L-2 12 L-8 5 L-16 11 L-19 6 C-26 11 -30 16 -32 24Z"
    return "", path(f"M-32 24 {_OVER} 32 24 {fringe}", colour)


def _long(colour: str) -> tuple[str, str]:
    return path("M-38 62 C-44 20 -42 -10 0 -10 C42 -10 44 20 38 62 Q0 68 -38 62Z", colour), _parted(colour, 48)


def _wavy(colour: str) -> tuple[str, str]:
    back = (
        "M0 -10 C-26 -10 -36 -2 -37 8 q-9 7 -2 14 q-9 7 -2 14 q-9 7 -1 14 q-2 8 8 9 Q0 62 34 59 "
        "q10 -1 8 -9 q8 -7 -1 -14 q7 -7 -2 -14 q7 -7 -2 -14 C36 -2 26 -10 0 -10Z"
    )
    front = (
        "M0 -10 C-24 -10 -34 -2 -35 8 q-5 6 0 12 q-5 7 0 14 q-4 6 4 10 q7 -4 2 -10 q4 -7 0 -12 "
        "C-26 12 -20 14 -16 8 C-10 10 -4 6 -4 1 C0 9 12 12 18 7 C22 14 27 12 29 22 q-4 5 0 12 q-5 6 2 10 "
        "q8 -4 4 -10 q5 -7 0 -14 q5 -6 0 -12 C34 -2 24 -10 0 -10Z"
    )
    return path(back, colour), path(front, colour)


def _curly(colour: str) -> tuple[str, str]:
    curls = [(-30, 14), (-28, 2), (-20, -7), (-7, -11), (7, -11), (20, -7), (28, 2), (30, 14)]
    curls += [(-12, 1), (0, 2), (12, 1)]
    circles = "".join(f'<circle cx="{x}" cy="{y}" r="9.5"/>' for x, y in curls)
    swirls = "M-24 4 q4 -6 8 0 M-4 -6 q4 -6 8 0 M16 4 q4 -6 8 0 M-33 14 q4 -5 7 1 M26 15 q4 -5 7 1"
    # One outline around all: the inner half of the circles' own is filled over.
    outline = f'<g stroke="{INK}" stroke-width="4.4">{circles}</g>'
    return "", f'{outline}<g fill="{colour}">{circles}</g>{_strands(swirls, colour)}'


def _spiky(colour: str) -> tuple[str, str]:
    d = (
        "M-31 24 L-36 4 L-28 5 L-32 -12 L-19 -5 L-15 -21 L-5 -9 L2 -24 L9 -9 L19 -21 L21 -5 L33 -12 L29 5 L36 4 L31 24 "
        "L25 9 L17 14 L11 6 L2 13 L-5 6 L-14 13 L-20 7Z"
    )
    return "", path(d, colour)


def _bob(colour: str) -> tuple[str, str]:
    back = "M-38 36 C-44 -4 -26 -10 0 -10 C26 -10 44 -4 38 36 Q30 43 20 38 L-20 38 Q-30 43 -38 36Z"
    front = "M-37 35 C-42 -2 -24 -10 0 -10 C24 -10 42 -2 37 35 Q32 41 25 37 L27 12 Q0 16 -27 12 L-25 37 Q-32 41 -37 35Z"
    fringe = "M-14 4 L-15 12 M0 5 L0 13 M14 4 L15 12"
    return path(back, colour), path(front, colour) + _strands(fringe, colour)


def _bun(colour: str) -> tuple[str, str]:
    return circle(0, -17, 12.5, colour) + _strands("M-6 -19 q6 -7 12 0", colour), _smooth(colour)


def _mohawk(colour: str) -> tuple[str, str]:
    d = "M-9 9 L-15 -8 L-9 -8 L-11 -22 L-4 -17 L1 -29 L5 -17 L12 -21 L10 -8 L15 -8 L9 9 Q0 12 -9 9Z"
    return "", path(d, colour)


def _ponytail(colour: str) -> tuple[str, str]:
    tail = "M-20 -2 C-32 -22 -60 -12 -54 22 C-52 38 -46 46 -44 54 C-36 44 -38 30 -34 20 C-32 12 -26 10 -22 8Z"
    back = path(tail, colour) + _strands("M-34 -4 C-46 2 -46 20 -44 34", colour)
    return back, _smooth(colour) + circle(-27, 0, 5, shade(colour, 0.6))


def _braids(colour: str) -> tuple[str, str]:
    braids = ""
    for x in (-37, 37):
        braids += path(f"M{x - 4} 53 L{x + 4} 53 L{x + 5} 64 L{x - 5} 64Z", colour)
        braids += "".join(ellipse(x, y, 6.5, 6, colour) for y in (46, 37, 28, 19))
        braids += path(f"M{x - 5} 51 H{x + 5} V55 H{x - 5}Z", shade(colour, 0.5))
    return "", braids + _parted(colour, 22)


_HAIR = {
    "short": _short,
    "long": _long,
    "wavy": _wavy,
    "curly": _curly,
    "spiky": _spiky,
    "bob": _bob,
    "bun": _bun,
    "mohawk": _mohawk,
    "ponytail": _ponytail,
    "braids": _braids,
}
