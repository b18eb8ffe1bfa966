"""Drawings of what a picture might show, on the plane in which bodies are drawn."""

from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

import numpy as np
import torch
from torch import Tensor

from experiments.tiny_base.bodies import Body
from experiments.tiny_base.characters import NEUTRAL, Pose, figure
from experiments.tiny_base.judge.cutout import core
from experiments.tiny_base.render import rasterize
from experiments.tiny_base.shapes import document
from experiments.tiny_base.vocabulary import HAIR, HATS, Look

OUTLINE = 2.25  # pixels: in the middle of what poses have


@dataclass(frozen=True)
class Frame:
    """A square window on the plane in which bodies are drawn, y downwards, and its resolution."""

    left: float
    top: float
    width: float
    pixels: int


# What a body wears reaches out of its 128 x 128.
WHOLE = Frame(-10, -24, 152, 76)


@dataclass(frozen=True)
class Subject:
    """A body as it can be asked for: `own` are SVG elements that always belong to it."""

    kind: str
    body: Body
    own: str = ""


class _Middle(Random):
    """Draws the middle of everything: exact colours and straight badges; `place` of the places there are."""

    def __init__(self, place: int):
        super().__init__(0)
        self.place = place

    def randint(self, a: int, b: int) -> int:
        return (a + b) // 2

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2

    def choice(self, seq):
        return seq[self.place % len(seq)]


@lru_cache(maxsize=1024)
def drawing(
    subject: Subject, coat: str, look: Look, frame: Frame = WHOLE, pose: Pose = NEUTRAL, place: int = 0
) -> Tensor:
    """(pixels, pixels, 4), RGB and alpha in [0, 1]: a subject with a coat "#rrggbb", not placed in a picture.

    Of the pose only arms, legs and gaze matter; `place` is which of its places a badge has."""
    pose = replace(pose, outline=OUTLINE)
    elements = figure(subject.body, coat, look, pose, _Middle(place), subject.own)
    svg = document(elements, (frame.left, frame.top, frame.width), OUTLINE)
    return torch.from_numpy(rasterize(svg, frame.pixels) / np.float32(255))


def drawn_core(subject: Subject, look: Look) -> Tensor:
    """(76, 76) bool: the silhouette without limbs of a subject in WHOLE. Only its hat and its hair change it."""
    return _drawn_core(subject, in_colour(Look("", hat=look.hat, hair=look.hair, mouth=None), "gray"))


@lru_cache(maxsize=4096)
def _drawn_core(subject: Subject, look: Look) -> Tensor:
    return core(drawing(subject, "#808080", look)[None, ..., 3] > 0.5)[0]


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / (a | b).sum().clamp(min=1))


# ---- Looks to draw


def in_colour(look: Look, colour: str) -> Look:
    """A look with its hat and hair in a colour that both palettes have."""
    return replace(look, hat=look.hat and (look.hat[0], colour), hair=look.hair and (look.hair[0], colour))


def all_hats(bare: Look) -> list[Look]:
    return [replace(bare, hat=(kind, "gray")) for kind in HATS]


def all_hair(bare: Look) -> list[Look]:
    return [replace(bare, hair=(kind, "gray")) for kind in HAIR]


def without_pattern(look: Look) -> Look:
    """A look without dots and stripes, of which the places are not known."""
    return replace(look, mark=None) if look.mark and look.mark[0] in ("dots", "stripes") else look
