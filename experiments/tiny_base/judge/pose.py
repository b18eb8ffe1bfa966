"""Which body a picture shows, and where.

Poses are (B, 5): turn in radians, logarithms of scale and of stretch, and x and y, in the picture's pixels, of the
middle of the body's plane, (64, 68)."""

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.tiny_base.judge.colours import BODY_ENDS, COAT_ENDS, Tinted, difference
from experiments.tiny_base.judge.cutout import Cutout, core
from experiments.tiny_base.judge.drawings import (
    WHOLE,
    Frame,
    Subject,
    all_hair,
    all_hats,
    drawing,
    drawn_core,
    in_colour,
    overlap,
    without_pattern,
)
from experiments.tiny_base.palette import COATS
from experiments.tiny_base.recipe import PIXELS
from experiments.tiny_base.vocabulary import Look

SHORTLIST = 8  # bodies whose silhouettes fit best are looked at in colour
UNLIKE = 0.42  # true drawings are hardly ever less like what was asked for, in shape and colour
STEPS = 16  # of the search for the pose
MIDDLE = (64, 68)


@dataclass(frozen=True)
class Found:
    """The subject of a picture, and where it is."""

    cutout: Cutout
    subject: Subject
    colour: str  # a name in the palette
    coat: str  # that colour as "#rrggbb"
    pose: Tensor  # (1, 5)
    placed: Tensor  # (1, 4, 76, 76): the cutout in that pose, in WHOLE
    overlap: float  # of the silhouettes of the picture and of the subject: intersection over union


def recognise(cutout: Cutout, subjects: list[Subject], kind: str, look: Look, palette: dict[str, str]) -> Found:
    """The subject that the picture shows, when a look of a kind was asked for.

    Every subject is tried in the hat or hair that was asked for, and bareheaded. If none of that is like the picture,
    it may wear something else, and everything is tried, which takes longer."""
    asked = without_pattern(look)
    bare = replace(asked, hat=None, hair=None)
    expected = [bare] if asked == bare else [asked, bare]
    fit = _fit(cutout, list(product(subjects, expected)), kind, palette)
    if fit.cost > UNLIKE:
        everything = [bare, *all_hats(bare), *all_hair(bare)]
        other = _fit(cutout, list(product(subjects, everything)), kind, palette)
        fit = min(fit, other, key=lambda each: each.cost)
    placed = warped(cutout.layers, fit.pose, WHOLE)
    dark, light = (drawing(fit.subject, coat, fit.look)[None] for coat in BODY_ENDS)
    (colour,), _ = Tinted(dark, light, BODY_ENDS).matched(placed, palette)
    overlapping = overlap(core(placed[:, 3] > 0.5)[0], drawn_core(fit.subject, fit.look))
    return Found(cutout, fit.subject, colour, palette[colour], fit.pose, placed, overlapping)


def warped(layers: Tensor, poses: Tensor, frame: Frame, margin: int = 0) -> Tensor:
    """The picture's layers (C, H, W) as they look in a frame, for each pose: (B, C, pixels, pixels).

    `margin` widens the frame by so many of its pixels on each side."""
    turn, scale, stretch, x, y = poses.unbind(1)
    wide, high = (scale + stretch / 2).exp(), (scale - stretch / 2).exp()
    step = frame.width / frame.pixels
    half = frame.width / 2 + margin * step
    middle_x, middle_y = frame.left + frame.width / 2 - MIDDLE[0], frame.top + frame.width / 2 - MIDDLE[1]
    size = frame.pixels + 2 * margin
    to_grid = PIXELS / 2  # grids have the picture from -1 to 1
    cos, sin = turn.cos(), turn.sin()
    a, b, c, d = wide * cos, -high * sin, wide * sin, high * cos
    rows = torch.stack([
        torch.stack([a * half, b * half, x + a * middle_x + b * middle_y - to_grid], -1),
        torch.stack([c * half, d * half, y + c * middle_x + d * middle_y - to_grid], -1),
    ], 1) / to_grid  # fmt: skip
    grid = F.affine_grid(rows, [len(poses), layers.shape[0], size, size], align_corners=False)
    return F.grid_sample(layers.expand(len(poses), -1, -1, -1), grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class _Fit:
    subject: Subject
    look: Look
    pose: Tensor  # (1, 5)
    cost: float


def _fit(cutout: Cutout, candidates: list[tuple[Subject, Look]], kind: str, palette: dict[str, str]) -> _Fit:
    """The best of the candidates whose silhouettes fit best, and of those of the kind that was asked for.

    The colours of bodies, hats and hair are those that the picture has there."""
    cores = torch.stack([drawn_core(subject, look) for subject, look in candidates])
    aligned = [_aligned(cutout.core, part) for part in cores.split(128)]
    overlaps, poses = (torch.cat(parts) for parts in zip(*aligned, strict=True))
    order = overlaps.argsort(descending=True).tolist()
    of_kind = [i for i in order if candidates[i][0].kind == kind]
    best = list(dict.fromkeys(order[:SHORTLIST] + of_kind[:2]))
    likely, poses = [candidates[i] for i in best], poses[best]

    def drawn(coat: str, head: str) -> Tensor:
        return torch.stack([drawing(subject, coat, in_colour(look, head)) for subject, look in likely])

    placed = warped(cutout.layers, poses, WHOLE)
    dark, light = (drawn(coat, "black") for coat in BODY_ENDS)
    light_heads = drawn(BODY_ENDS[0], "white")
    _, bodies = Tinted(dark, light, BODY_ENDS).matched(placed, palette)
    _, heads = Tinted(dark, light_heads, COAT_ENDS).matched(placed, COATS)
    both = torch.cat([(bodies + heads - dark)[..., :3].clamp(0, 1), bodies[..., 3:]], -1)
    poses, costs = _refined(cutout.layers, cutout.on_ground(both), poses)
    winner = int(costs.argmin())
    return _Fit(*likely[winner], poses[winner][None], float(costs[winner]))


def _aligned(seen: Tensor, cores: Tensor) -> tuple[Tensor, Tensor]:
    """The picture's core (64, 64) laid on each of cores in WHOLE (B, 76, 76): intersection over union, and the poses.

    Their middles and areas are made equal; turns and stretches are tried."""
    unit = WHOLE.width / WHOLE.pixels
    masks = cores.float()
    places = torch.arange(WHOLE.pixels) * unit + unit / 2
    areas = masks.sum((1, 2)).clamp(min=1)
    xs = (masks.sum(1) * (places + WHOLE.left)).sum(1) / areas
    ys = (masks.sum(2) * (places + WHOLE.top)).sum(1) / areas
    own = seen.float()
    area = own.sum().clamp(min=1)
    own_places = torch.arange(PIXELS // 2) * 2 + 1.0
    x, y = (own.sum(0) * own_places).sum() / area, (own.sum(1) * own_places).sum() / area
    scale = (area * 4 / (areas * unit**2)).sqrt()

    overlaps, poses = [], []
    for turn, stretch in ((0, 0), (-7, 0), (7, 0), (0, -0.07), (0, 0.07)):
        angle = torch.full_like(scale, math.radians(turn))
        wide, high = scale * math.exp(stretch / 2), scale * math.exp(-stretch / 2)
        dx, dy = wide * (MIDDLE[0] - xs), high * (MIDDLE[1] - ys)
        pose = torch.stack([
            angle,
            scale.log(),
            torch.full_like(scale, stretch),
            x + angle.cos() * dx - angle.sin() * dy,
            y + angle.sin() * dx + angle.cos() * dy,
        ], 1)  # fmt: skip
        placed = warped(own[None], pose, WHOLE)[:, 0]
        both = torch.minimum(placed, masks).sum((1, 2))
        overlaps.append(both / torch.maximum(placed, masks).sum((1, 2)))
        poses.append(pose)
    best = torch.stack(overlaps).max(0)
    return best.values, torch.stack(poses)[best.indices, torch.arange(len(cores))]


def _refined(layers: Tensor, drawn: Tensor, poses: Tensor) -> tuple[Tensor, Tensor]:
    """Poses (B, 5) from which the picture looks most like each drawing (B, 4, H, W), and what difference is left."""
    unit = torch.tensor([0.03, 0.03, 0.03, 1.2, 1.2])
    change = torch.zeros_like(poses, requires_grad=True)
    optimizer = torch.optim.Adam([change], betas=(0.7, 0.9))
    best, least = poses.clone(), torch.full((len(poses),), torch.inf)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.6 * (1 - step / STEPS) + 0.05
        optimizer.zero_grad()
        now = poses + change * unit
        costs = _costs(warped(layers, now, WHOLE), drawn)
        better = costs.detach() < least
        least = torch.where(better, costs.detach(), least)
        best = torch.where(better[:, None], now.detach(), best)
        costs.sum().backward()
        optimizer.step()
    return best, least


def _costs(placed: Tensor, drawn: Tensor) -> Tensor:
    """(B,): how unlike pictures and drawings (B, 4, H, W) are, as a share of what either covers."""
    colour = difference(placed[:, :3], drawn[:, :3])
    shape = (placed[:, 3] - drawn[:, 3]).square()
    covered = torch.maximum(placed[:, 3], drawn[:, 3]).detach().sum((1, 2)).clamp(min=1)
    return (colour + shape).sum((1, 2)) / covered
