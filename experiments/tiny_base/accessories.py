"""What a character wears, its face and its limbs: every value of the vocabulary as SVG elements.

Bodies are drawn in 128 x 128 pixels with y downwards; their anchors say where things go. A face is drawn about
(0, 0), between eyes and mouth, hats and hair about (0, 0) at the head's top, and each is then moved and scaled to its
anchor. Left and right are the subject's own, so its left eye and its left hand have the larger x.
"""

import math
from random import Random

from experiments.tiny_base.bodies import Body
from experiments.tiny_base.palette import INK, shade
from experiments.tiny_base.shapes import OUTLINE, circle, ellipse, line, patch, path, ring, spots, star, thin, tube
from experiments.tiny_base.vocabulary import Look

# Where an arm's hand and elbow are, in pixels outwards and downwards of the shoulder: (hand x, y, elbow x, y). The
# elbow is the control point of a quadratic curve, so the arm bends half as far as it says.
Arm = tuple[float, float, float, float]

Box = tuple[float, float, float, float]  # left, top, right, bottom

HAND = 4.3  # radii in pixels
OPEN_HAND = 6.2
LEG = 9  # height of the legs
FOOT = 6  # length of a foot

LIMB_WIDTH = 3.2
SLEEVE_WIDTH = 6.6  # within its outline
WHITE = "#ffffff"
GOLD = "#f7dc5a"
BROWN = "#5b3a26"  # of beards


# ---- Limbs


def legs(body: Body, spread: float) -> str:
    """Two legs, their feet `spread` to either side of the middle; none for a body without feet."""
    if body.feet is None:
        return ""
    elements = ""
    for outwards in (-1, 1):
        foot, sole = 64 + outwards * spread, body.feet + LEG
        d = f"M{64 + outwards * 11} {body.feet - 3} L{foot:.1f} {sole} L{foot + outwards * FOOT:.1f} {sole}"
        elements += line(d, width=LIMB_WIDTH)
    return elements


def limb(body: Body, outwards: int, arm: Arm, radius: float, skin: str, sleeve: str | None) -> str:
    """An arm with a hand of that radius: `outwards` is -1 for its right arm, 1 for its left one. A shirt's short
    sleeve, of that colour, covers its beginning."""
    (x0, y0), (x1, y1), (x2, y2) = _curve(body, outwards, arm)
    elements = line(f"M{x0:.1f} {y0:.1f} Q{x1:.1f} {y1:.1f} {x2:.1f} {y2:.1f}", width=LIMB_WIDTH)
    if sleeve:
        # The first third of the curve: its control point is a third of the way to the whole one's.
        bend = f"{(2 * x0 + x1) / 3:.1f} {(2 * y0 + y1) / 3:.1f}"
        end = f"{(4 * x0 + 4 * x1 + x2) / 9:.1f} {(4 * y0 + 4 * y1 + y2) / 9:.1f}"
        elements += tube(f"M{x0:.1f} {y0:.1f} Q{bend} {end}", sleeve, SLEEVE_WIDTH)
    return elements + circle(round(x2, 1), round(y2, 1), radius, skin)


def limb_box(body: Body, outwards: int, arm: Arm, radius: float) -> Box:
    """Around the hand and the middle of the arm, where it bends."""
    (x0, y0), (x1, y1), (x2, y2) = _curve(body, outwards, arm)
    bend_x, bend_y, half = (x0 + 2 * x1 + x2) / 4, (y0 + 2 * y1 + y2) / 4, SLEEVE_WIDTH / 2 + 1
    return (
        min(x2 - radius, bend_x - half),
        min(y2 - radius, bend_y - half),
        max(x2 + radius, bend_x + half),
        max(y2 + radius, bend_y + half),
    )


def _curve(body: Body, outwards: int, arm: Arm) -> list[tuple[float, float]]:
    """Shoulder, elbow and hand: the points of the arm's quadratic curve."""
    half_width, y = body.arms
    x = 64 + outwards * (half_width - 2)
    hand_x, hand_y, elbow_x, elbow_y = arm
    return [(x, y), (x + outwards * elbow_x, y + elbow_y), (x + outwards * hand_x, y + hand_y)]


# ---- The face


def face(look: Look, anchor: tuple[float, float, float]) -> str:
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
    x, y, scale = anchor
    return f'<g transform="translate({x:.1f} {y:.1f}) scale({scale:.2f})">{"".join(elements)}</g>'


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
            return thin(_heart(x, -4, 7.2), "#ee2f4b", 1.6)
    raise ValueError(f"no such eyes: {kind}")


def _heart(x: float, y: float, r: float) -> str:
    """Path data of a heart 2 r wide."""
    return (
        f"M{x:.1f} {y + 0.95 * r:.1f} C{x - 0.5 * r:.1f} {y + 0.6 * r:.1f} {x - r:.1f} {y + 0.2 * r:.1f} "
        f"{x - r:.1f} {y - 0.35 * r:.1f} C{x - r:.1f} {y - 1.05 * r:.1f} {x - 0.2 * r:.1f} {y - 1.1 * r:.1f} "
        f"{x:.1f} {y - 0.45 * r:.1f} C{x + 0.2 * r:.1f} {y - 1.1 * r:.1f} {x + r:.1f} {y - 1.05 * r:.1f} "
        f"{x + r:.1f} {y - 0.35 * r:.1f} C{x + r:.1f} {y + 0.2 * r:.1f} {x + 0.5 * r:.1f} {y + 0.6 * r:.1f} "
        f"{x:.1f} {y + 0.95 * r:.1f}Z"
    )


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


# ---- Hats, drawn for a head that is 24 wide to either side at its top


def hat(kind: str, colour: str, body: Body) -> str:
    x, y, scale = _hat_anchor(body)
    return f'<g transform="translate({x:.1f} {y:.1f}) scale({scale:.2f})">{_HATS[kind](colour)}</g>'


def hat_box(kind: str, body: Body) -> Box:
    x, y, scale = _hat_anchor(body)
    half_width, height = _HAT_SIZE[kind]
    return x - scale * half_width, y - scale * height, x + scale * half_width, y


def _hat_anchor(body: Body) -> tuple[float, float, float]:
    y, half_width = body.top
    return body.face[0], y + 3, max(0.75, half_width / 24)


_HAT_SIZE = {  # half the width, and the height above the anchor
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


# ---- Hair, drawn for a head that is 32 wide to either side at its eyes


def hair(kind: str, colour: str, body: Body) -> tuple[str, str]:
    """The hair behind the whole body, and the hair in front of it."""
    x, y, scale = _hair_anchor(body)
    back, front = (
        f'<g transform="translate({x:.1f} {y:.1f}) scale({scale:.2f})">{layer}</g>' for layer in _HAIR[kind](colour)
    )
    return back, front


def hair_box(kind: str, body: Body) -> Box:
    x, y, scale = _hair_anchor(body)
    half_width, height, length = _HAIR_SIZE[kind]
    return x - scale * half_width, y - scale * height, x + scale * half_width, y + scale * length


def _hair_anchor(body: Body) -> tuple[float, float, float]:
    # The eyes are between the head's top and the arms, and so is the head's width there.
    y, half_width = body.top
    return body.face[0], y, max(0.75, (0.6 * half_width + 0.55 * body.arms[0]) / 32)


_HAIR_SIZE = {  # half the width, the height above the head's top, the length below it
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


# ---- On the body


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
    neck = f"translate({x:.1f} {_neck(body):.1f}) scale({scale:.2f})"
    match kind:
        case "dots":
            return _dots(colour, rng), ""
        case "stripes":
            return _stripes(colour, rng), ""
        case "scarf":
            band, end = _scarf(colour)
            return f'<g transform="{neck}">{band}</g>', f'<g transform="{neck}">{end}</g>'
        case "bow tie":
            return "", f'<g transform="{neck}">{_bow_tie(colour)}</g>'
        case "flower" | "heart" | "star":
            sideways, down = rng.choice(_badge_places(look, body))
            place = f"translate({x + sideways * scale:.1f} {y + down * scale:.1f}) rotate({rng.uniform(-15, 15):.0f})"
            return "", f'<g transform="{place}">{_BADGES[kind](colour)}</g>'
    raise ValueError(f"no such mark: {kind}")


def _badge_places(look: Look, body: Body) -> list[tuple[float, float]]:
    """Beside the mouth, or where the head is wide and bare, above an eye."""
    beside_mouth = [(-21, 18), (21, 18)]
    above_eyes = [(-21, -20), (21, -20)]
    bare = not look.hair and not look.hat and body.top[1] >= 22
    return beside_mouth + above_eyes if bare else beside_mouth


def _flower(colour: str) -> str:
    return ring(0, 0, 5.4, 4.4, 5, colour) + circle(0, 0, 3, GOLD)


_BADGES = {
    "flower": _flower,
    "heart": lambda colour: path(_heart(0, 0, 8.5), colour),
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
