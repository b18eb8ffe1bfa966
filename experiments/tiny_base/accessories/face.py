"""Cheeks, eyes, glasses, facial hair and mouths."""

import math

from experiments.tiny_base.palette import INK, WHITE
from experiments.tiny_base.shapes import circle, ellipse, heart, line, patch, path, placed, spots, star, thin
from experiments.tiny_base.vocabulary import Look

BROWN = "#5b3a26"  # of beards


def draw(look: Look, anchor: tuple[float, float, float]) -> str:
    """Cheeks, eyes, glasses, facial hair and mouth, at an anchor (centre x, y, scale)."""
    elements = [_CHEEKS] if look.cheeks else []
    if look.glasses != "sun":
        right = {"wink_right": "wink", "wink_left": "open"}.get(look.eyes, look.eyes)
        left = {"wink_left": "wink", "wink_right": "open"}.get(look.eyes, look.eyes)
        elements += [_eye(right, -1), _eye(left, 1)]
    if look.glasses:
        elements.append(_GLASSES[look.glasses])
    mouth = _MOUTHS[look.mouth] if look.mouth else ""
    if look.facial_hair == "moustache":  # lies over the mouth, so that has to be a little lower
        elements.append(f'<g transform="translate(0 3)">{mouth}</g>{_MOUSTACHE}')
    else:
        elements.append(_BEARDS[look.facial_hair] + mouth if look.facial_hair else mouth)
    return placed("".join(elements), *anchor)


def _eye(kind: str, side: int) -> str:
    """One eye: side is -1 for its right, 1 for its left."""
    x = 11 * side
    inner, outer = x - 5 * side, x + 5 * side
    match kind:
        case "open":
            return spots(INK, (x, -4, 3.6, 3.6)) + spots(WHITE, (x + 1.2, -5.2, 1.2, 1.2))
        case "wink":
            return line(f"M{inner} -4 L{outer} -4", width=2.6)
        case "closed":
            return line(f"M{inner} -5 Q{x} 1 {outer} -5", width=2.4)
        case "happy":
            return line(f"M{inner} -2 Q{x} -10 {outer} -2", width=2.4)
        case "sad":
            return spots(INK, (x, -3, 3.4, 3.4)) + line(f"M{inner} -12 L{outer} -8")
        case "big":
            return circle(x, -4, 7, WHITE) + spots(INK, (x, -4, 3.6, 3.6))
        case "angry":
            return spots(INK, (x, -3, 3.4, 3.4)) + line(f"M{inner - side} -6.5 L{outer + side} -12", width=3)
        case "star":
            return thin(star(x, -4, 8.4, 3.8), "#ffd93d", 1.6)
        case "heart":
            return thin(heart(x, -4, 7.2), "#ee2f4b", 1.6)
    raise ValueError(f"no such eyes: {kind}")


_CHEEKS = f'<g opacity="0.85">{spots("#f58ea6", (-19, 6, 5, 3.2), (19, 6, 5, 3.2))}</g>'

_TEMPLES = '<path d="M-2 -4 L2 -4 M-20 -5 L-27 -7 M20 -5 L27 -7"/>'
_FRAME = f'fill="{WHITE}" fill-opacity="0.25" stroke="{INK}" stroke-width="2.4"'
_GLASSES = {
    "round": f'<g {_FRAME}><circle cx="-11" cy="-4" r="9"/><circle cx="11" cy="-4" r="9"/>{_TEMPLES}</g>',
    "square": (
        f'<g {_FRAME}><rect x="-20" y="-11" width="18" height="14" rx="1"/>'
        f'<rect x="2" y="-11" width="18" height="14" rx="1"/>{_TEMPLES}</g>'
    ),
    "sun": (
        path("M-22 -11 L-2 -11 L-3 0 Q-12 6 -20 0Z M22 -11 L2 -11 L3 0 Q12 6 20 0Z", INK)
        + line("M-3 -9 L3 -9 M-20 -9 L-27 -8 M20 -9 L27 -8", width=2.6)
        + line("M-17 -8 L-12 -8 M7 -8 L12 -8", WHITE, 1.6)
    ),
}

_MOUTHS = {
    "smile": line("M-8 10 Q0 19 8 10", width=2.4),
    "laugh": path("M-9 9 L9 9 Q7 21 0 21 Q-7 21 -9 9Z", "#8d2238") + patch("M-5 18 Q0 14 5 18 Q0 22 -5 18Z", "#f2808f"),
    "frown": line("M-8 17 Q0 8 8 17", width=2.4),
    "surprised": ellipse(0, 14, 4, 5.5, "#8d2238"),
    "serious": line("M-7 13 L7 13", width=2.6),
    "tongue": line("M-9 10 Q0 16 9 10", width=2.4) + path("M-3 13 L-3 18 Q0 23 4 18 L4 12.6Z", "#f2708a"),
    "teeth": (
        path("M-11 9 Q0 11 11 9 Q12 20 0 20 Q-12 20 -11 9Z", WHITE)
        + line("M-11 14.4 Q0 16 11 14.4 M-5.5 10 L-5 19 M0 10 L0 20 M5.5 10 L5 19", width=1.2)
    ),
}


def _stubble() -> str:
    """Short hairs in staggered rows along the jaw, none of them on the mouth."""
    hairs = []
    for row in range(7):
        y = 4 + 3.4 * row
        half_width = 22 * math.sqrt(1 - (row / 8) ** 2)
        for column in range(-6, 7):
            x = 4.2 * column + 2.1 * (row % 2)
            if abs(x) <= half_width and math.hypot(x / 12, (y - 14) / 8) > 1:
                hairs.append((round(x, 1), round(y, 1), 1, 1))
    return spots(INK, *hairs)


_MOUSTACHE = thin("M0 6 C-5 3 -12 4 -17 9 C-12 12 -5 12 0 9 C5 12 12 12 17 9 C12 4 5 3 0 6Z", "#3b2a20", 1)
_BEARDS = {
    "beard": (
        thin("M-21 1 Q-12 5 0 5 Q12 5 21 1 Q22 27 0 28 Q-22 27 -21 1Z", BROWN, 1.4) + spots("#f2d9c4", (0, 13.5, 12, 7))
    ),
    "goatee": thin("M-8 17 Q0 22 8 17 Q10 26 0 33 Q-10 26 -8 17Z", BROWN, 1.4),
    "stubble": _stubble(),
}
