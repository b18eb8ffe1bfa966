"""Random cartoon characters: a body, what it wears, and how it stands."""

import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

from experiments.tiny_base.accessories import clothes, face, hair, hats, limbs
from experiments.tiny_base.accessories.limbs import Arm
from experiments.tiny_base.bodies import BODIES, Body, random_blob
from experiments.tiny_base.palette import COATS, HAIRS, to_rgb, vary
from experiments.tiny_base.render import rasterize
from experiments.tiny_base.shapes import Box, document
from experiments.tiny_base.vocabulary import EYES, FACIAL_HAIR, GLASSES, HAIR, HANDS, HATS, MARKS, MOUTHS, Look

ROOM = 121  # pixels: the picture less, on each side, a margin of 2 and half an outline
ALIKE = 60  # colours closer than this in RGB cannot be told apart on one another

EYE_WEIGHTS = dict.fromkeys(EYES, 1.8) | {"open": 6}
MOUTH_WEIGHTS = dict.fromkeys(MOUTHS, 2) | {"smile": 5}


@dataclass(frozen=True)
class Pose:
    """How a character stands in the picture. Pairs of arms are its right one and its left one."""

    hanging: tuple[Arm, Arm]
    raised: tuple[Arm, Arm]
    turn: float = 0  # degrees, clockwise
    scale: float = 1
    stretch: float = 1  # width over height, relative to the body as it is drawn
    dx: float = 0  # of the whole character's middle from the picture's, in pixels, as far as there is room
    dy: float = 0
    gaze: tuple[float, float] = (0, 0)  # of the face on the body, in pixels
    leg_spread: float = 11  # from the middle to a foot, in pixels
    outline: float = 2.2  # width of the lines before scaling, in pixels


_HANGING: Arm = (11, 15, 13, 3)
_RAISED: Arm = (15, -22, 13, 2)
NEUTRAL = Pose(hanging=(_HANGING, _HANGING), raised=(_RAISED, _RAISED))


def random_pose(rng: Random) -> Pose:
    hanging = _random_hanging(rng)
    return Pose(
        hanging=(hanging, hanging if rng.random() < 0.5 else _random_hanging(rng)),
        raised=(_random_raised(rng), _random_raised(rng)),
        turn=rng.uniform(-10, 10),
        scale=rng.uniform(0.84, 1.12),
        stretch=rng.uniform(0.92, 1.08),
        dx=rng.uniform(-12, 12),
        dy=rng.uniform(-12, 12),
        gaze=(rng.uniform(-3, 3), rng.uniform(-1.5, 1.5)),
        leg_spread=rng.uniform(8, 15),
        outline=rng.uniform(1.9, 2.6),
    )


def _random_hanging(rng: Random) -> Arm:
    """Down at the side, held out, or with the hand on the hip: always well below the shoulder."""
    posture = rng.choice(("down", "out", "hip"))
    if posture == "down":
        hand_x = rng.uniform(9, 14)
        return hand_x, rng.uniform(14, 19), hand_x + rng.uniform(1, 4), rng.uniform(1, 5)
    if posture == "out":
        return rng.uniform(15, 19), rng.uniform(9, 13), rng.uniform(8, 12), rng.uniform(-1, 3)
    return rng.uniform(3, 5), rng.uniform(15, 18), rng.uniform(22, 27), rng.uniform(5, 9)


def _random_raised(rng: Random) -> Arm:
    return rng.uniform(13, 18), rng.uniform(-26, -21), rng.uniform(12, 17), rng.uniform(-2, 4)


def random_look(kind: str, colour: str, rng: Random) -> Look:
    """Attributes independent of one another, so that all combinations of them occur."""
    glasses = rng.choice(list(GLASSES)) if rng.random() < 1 / 3 else None
    head = rng.random()  # a hat, hair or neither
    shirt = _visible(COATS, [colour], rng) if rng.random() < 1 / 4 else None
    mark = rng.choice(list(MARKS)) if rng.random() < 1 / 4 else None
    # Dots and stripes are under a face of ink, a flower's petals are told apart by it.
    under_mark = [colour, *([shirt] if shirt else []), *(["black"] if mark in ("dots", "stripes", "flower") else [])]
    return Look(
        subject=f"{colour} {kind}",
        hair=(rng.choice(list(HAIR)), _visible(HAIRS, [colour], rng)) if head < 1 / 3 else None,
        hat=(rng.choice(HATS), _visible(COATS, [colour], rng)) if head > 2 / 3 else None,
        glasses=glasses,
        facial_hair=rng.choice(list(FACIAL_HAIR)) if rng.random() < 1 / 3 else None,
        eyes="open" if glasses == "sun" else _weighted(EYE_WEIGHTS, rng),
        mouth=_weighted(MOUTH_WEIGHTS, rng),
        cheeks=rng.random() < 0.3,
        shirt=shirt,
        mark=(mark, _visible(COATS, under_mark, rng)) if mark else None,
        hands=rng.choice(list(HANDS)) if rng.random() < 1 / 3 else None,
    )


def _weighted(weights: dict[str, float], rng: Random) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _visible(palette: dict[str, str], grounds: list[str], rng: Random) -> str:
    """A colour's name, of those that can be told from the coats they are seen against."""
    return rng.choice(
        [
            name
            for name, colour in palette.items()
            if all(math.dist(to_rgb(colour), to_rgb(COATS[ground])) > ALIKE for ground in grounds)
        ]
    )


def random_character(rng: Random) -> tuple[str, Look]:
    """An SVG document and what can be said of it."""
    if rng.random() < 0.1:
        kind, body = "blob", random_blob(rng)
    else:
        kind, body = rng.choice(list(BODIES.items()))
    colour = rng.choice(body.colours)
    look = random_look(kind, colour, rng)
    return draw(body, vary(COATS[colour], rng), look, random_pose(rng), rng), look


def draw(body: Body, coat: str, look: Look, pose: Pose, rng: Random, extra: str = "") -> str:
    """An SVG document of 128 x 128 with a transparent background: a figure in its place in the picture."""
    elements = figure(body, coat, look, pose, rng, extra)
    placement = _placement(_extent(body, look, pose), pose)
    return document(f'<g transform="{placement}">{elements}</g>', outline=pose.outline)


def figure(body: Body, coat: str, look: Look, pose: Pose, rng: Random, extra: str = "") -> str:
    """A character as SVG elements on the plane in which bodies are drawn, before it is placed in the picture.

    `coat` is the body's colour "#rrggbb"; `extra` are elements over the body and under its face. `rng` draws the
    exact colours of what is worn and the place of a badge."""
    hair_back = hair_front = hat = mark_inside = mark_over = ""
    if look.hair:
        hair_back, hair_front = hair.draw(look.hair[0], vary(HAIRS[look.hair[1]], rng), body)
    if look.hat:
        hat = hats.draw(look.hat[0], vary(COATS[look.hat[1]], rng), body)
    shirt = vary(COATS[look.shirt], rng) if look.shirt else None
    if look.mark:
        mark_inside, mark_over = clothes.mark(look.mark[0], vary(COATS[look.mark[1]], rng), look, body, rng)
    inside = (clothes.shirt(shirt, body) if shirt else "") + mark_inside
    hanging, raised = _arms(body, coat, look, pose, shirt)
    face_x, face_y, face_scale = body.face
    layers = [
        hair_back,
        limbs.legs(body, pose.leg_spread),
        hanging,
        f'<g id="body">{body.paint(coat)}</g>',
        _clipped(inside, pose.outline) if inside else "",
        raised,
        mark_over,
        extra,
        face.draw(look, (face_x + pose.gaze[0], face_y + pose.gaze[1], face_scale)),
        hair_front,
        hat,
    ]
    return "".join(layers)


def _arms(body: Body, coat: str, look: Look, pose: Pose, sleeve: str | None) -> tuple[str, str]:
    """The hanging arms, which are behind the body, and the raised ones, in front of it: there no body hides them."""
    hanging = raised = ""
    for outwards, arm, radius in _arm_shapes(look, pose):
        limb = limbs.limb(body, outwards, arm, radius, coat, sleeve)
        if arm[1] < 0:
            raised += limb
        else:
            hanging += limb
    return hanging, raised


def _arm_shapes(look: Look, pose: Pose) -> list[tuple[int, Arm, float]]:
    """Of its right arm and its left one: which way is outwards, the arm, the hand's radius."""
    return [
        (outwards, pose.raised[i], limbs.OPEN_HAND)
        if look.hands in (side, "both")
        else (outwards, pose.hanging[i], limbs.HAND)
        for i, (side, outwards) in enumerate((("right", -1), ("left", 1)))
    ]


def _clipped(elements: str, outline: float) -> str:
    """The elements where the body is, but for the outline around all of it."""
    return (
        f'<filter id="thinner"><feMorphology operator="erode" radius="{outline:.2f}"/></filter>'
        '<mask id="inside" style="mask-type:alpha" maskUnits="userSpaceOnUse" x="0" y="0" width="128" height="128">'
        '<use href="#body" filter="url(#thinner)"/></mask>'
        f'<g mask="url(#inside)">{elements}</g>'
    )


# ---- Keeping all of it in the picture


def _extent(body: Body, look: Look, pose: Pose) -> list[Box]:
    """Boxes around all parts of the character before it is placed, but for half the width of the outline."""
    boxes = [_body_box(body)]
    boxes += [limbs.limb_box(body, outwards, arm, radius) for outwards, arm, radius in _arm_shapes(look, pose)]
    if body.feet is not None:
        boxes.append(limbs.legs_box(body, pose.leg_spread))
    if look.hair:
        boxes.append(hair.box(look.hair[0], body))
    if look.hat:
        boxes.append(hats.box(look.hat[0], body))
    if look.mark and look.mark[0] == "scarf":
        boxes.append(clothes.scarf_box(body))
    return boxes


@lru_cache(maxsize=256)
def _body_box(body: Body) -> Box:
    opaque = rasterize(document(body.paint(COATS["gray"]), outline=NEUTRAL.outline))[..., 3]
    columns, rows = np.flatnonzero(opaque.any(0)), np.flatnonzero(opaque.any(1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _placement(boxes: list[Box], pose: Pose) -> str:
    """The transform into the picture: scaled down where the pose is too large for it, moved only as far as fits."""
    turn = math.radians(pose.turn)
    wide, high = pose.scale * math.sqrt(pose.stretch), pose.scale / math.sqrt(pose.stretch)
    corners = [(x, y) for left, top, right, bottom in boxes for x in (left, right) for y in (top, bottom)]
    xs = [math.cos(turn) * wide * x - math.sin(turn) * high * y for x, y in corners]
    ys = [math.sin(turn) * wide * x + math.cos(turn) * high * y for x, y in corners]
    shrink = min(1, ROOM / (max(xs) - min(xs)), ROOM / (max(ys) - min(ys)))
    x, y = (_offset(shrink * min(xs), shrink * max(xs), pose.dx), _offset(shrink * min(ys), shrink * max(ys), pose.dy))
    return f"translate({x:.2f} {y:.2f}) rotate({pose.turn:.2f}) scale({shrink * wide:.4f} {shrink * high:.4f})"


def _offset(start: float, end: float, shift: float) -> float:
    """What moves the span from `start` to `end` to the picture's middle and by `shift`, or as far as there is room."""
    free = (ROOM - (end - start)) / 2
    return 64 - (start + end) / 2 + max(-free, min(free, shift))
