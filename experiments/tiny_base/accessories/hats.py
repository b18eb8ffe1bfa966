"""Hats, drawn for a head that is 24 wide to either side at its top."""

from experiments.tiny_base.bodies import Body
from experiments.tiny_base.palette import GOLD, WHITE, shade
from experiments.tiny_base.shapes import OUTLINE, Box, circle, ellipse, line, patch, path, placed, spots, star


def draw(kind: str, colour: str, body: Body) -> str:
    """SVG elements of one of vocabulary.HATS in a colour "#rrggbb", on the body's head."""
    return placed(_HATS[kind](colour), *_anchor(body))


def box(kind: str, body: Body) -> Box:
    """Around the hat down to the head's top; what there is of it below, the body reaches further down."""
    x, y, scale = _anchor(body)
    half_width, height = _SIZES[kind]
    return x - scale * half_width, y - scale * height, x + scale * half_width, y


def _anchor(body: Body) -> tuple[float, float, float]:
    y, half_width = body.top
    return body.face[0], y + 3, max(0.75, half_width / 24)


_SIZES = {  # half the width, and the height above the anchor
    "top hat": (28, 22),
    "cap": (38, 13),
    "beanie": (26, 25),
    "party hat": (16, 30),
    "crown": (23, 20),
    "bow": (18, 13),
    "chef hat": (30, 36),
    "straw hat": (39, 18),
    "wizard hat": (33, 45),
}


def _top_hat(colour: str) -> str:
    return (
        path("M-14 2 L-14 -20 L14 -20 L14 2Z", colour)
        + patch("M-14 -6 L14 -6 L14 -1 L-14 -1Z", shade(colour, 0.55))
        + line("M-24 3 L24 3", width=7.6)
        + line("M-24 3 L24 3", colour, 3.6)
    )


def _cap(colour: str) -> str:
    return path("M-20 6 C-20 -16 20 -16 20 6Z", colour) + path("M6 6 L36 6 Q34 0 18 -1Z", shade(colour))


def _beanie(colour: str) -> str:
    return (
        path("M-22 4 C-22 -22 22 -22 22 4Z", colour)
        + f'<rect x="-24" y="0" width="48" height="8" rx="3" fill="{shade(colour)}" {OUTLINE}/>'
        + circle(0, -18, 5, WHITE)
    )


def _party_hat(colour: str) -> str:
    return path("M-14 5 L0 -24 L14 5Z", colour) + circle(0, -24, 4, GOLD) + spots(WHITE, (-3, -3, 2, 2), (4, -10, 2, 2))


def _crown(colour: str) -> str:
    return path("M-19 6 L-21 -14 L-10 -4 L0 -18 L10 -4 L21 -14 L19 6Z", colour) + spots(WHITE, (0, 0, 2.4, 2.4))


def _bow(colour: str) -> str:
    return path("M0 -2 L-16 -11 L-16 8Z M0 -2 L16 -11 L16 8Z", colour) + circle(0, -2, 4, shade(colour))


def _chef_hat(colour: str) -> str:
    return (
        path("M-16 -4 C-32 -5 -30 -27 -16 -25 C-12 -37 12 -37 16 -25 C30 -27 32 -5 16 -4Z", colour)
        + path("M-16 6 L-17 -6 Q0 -9 17 -6 L16 6Z", colour)
        + line("M-7 -13 L-6 -20 M7 -13 L6 -20", width=1.8)
    )


def _straw_hat(colour: str) -> str:
    weave = "M-30 6 L-26 3 M-24 8 L-20 5 M-14 10 L-10 6 M-3 11 L1 7 M8 10 L12 6 M19 9 L23 5 M28 7 L31 4 M-10 -9 L10 -9"
    return (
        ellipse(0, 5, 37, 7, colour)
        + path("M-19 4 C-19 -20 19 -20 19 4 Q0 9 -19 4Z", colour)
        + path("M-19 4 L-18 -4 Q0 1 18 -4 L19 4 Q0 9 -19 4Z", shade(colour, 0.5))
        + line(weave, shade(colour, 0.6), 1.6)
    )


def _wizard_hat(colour: str) -> str:
    return (
        ellipse(0, 5, 31, 6, shade(colour))
        + path("M-19 4 C-12 -10 -9 -30 13 -42 C8 -30 14 -12 19 4 Q0 10 -19 4Z", colour)
        + patch(star(-3, -6, 6, 2.7) + star(5, -22, 4.6, 2), "#fff3a8")
    )


_HATS = {
    "top hat": _top_hat,
    "cap": _cap,
    "beanie": _beanie,
    "party hat": _party_hat,
    "crown": _crown,
    "bow": _bow,
    "chef hat": _chef_hat,
    "straw hat": _straw_hat,
    "wizard hat": _wizard_hat,
}
