"""A picture's subject, cut out of its background."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.tiny_base.judge.colours import to_lab
from experiments.tiny_base.recipe import PIXELS
from experiments.tiny_base.render import DARK, LUMA, to_unit

PLAIN = 16  # Lab: what differs less from the background's colour, and touches it, is background
RIMMED = DARK + 12  # of 255: a background less bright than this is a dark one, with a rim around the subject


class Cutout:
    """A picture's subject.

    `layers` are (4, 128, 128), Lab and silhouette, `core` is its silhouette without limbs, (64, 64) bool, and `ground`
    the colour, (3,) in [0, 1], that drawings of it are put on. On a dark background the renderer puts a light rim
    around a subject; it is cut off, and the ground becomes a gray on which ink shows."""

    def __init__(self, rgb: Tensor, ground: Tensor):
        plain = (to_lab(rgb) - to_lab(ground[:, None, None])).norm(dim=0) < PLAIN
        inside = ~_reached(plain)
        if float(ground @ torch.tensor(LUMA)) * 255 < RIMMED:
            inside = -F.max_pool2d(-inside[None].float(), 5, 1, 2)[0] > 0
            ground = torch.full((3,), 0.55)
        rgb = torch.where(inside, rgb, ground[:, None, None])
        self.ground = ground
        self.layers = torch.cat([to_lab(rgb), inside[None].float()])
        self.core = core(F.avg_pool2d(inside[None].float(), 2) > 0.5)[0]

    def on_ground(self, drawings: Tensor) -> Tensor:
        """Drawings (B, H, W, 4), RGB and alpha in [0, 1], on the ground: (B, 4, H, W) as `layers`."""
        rgb, alpha = drawings.movedim(-1, -3).split((3, 1), -3)
        ground = self.ground[:, None, None]
        return torch.cat([to_lab(ground + (rgb - ground) * alpha), alpha], -3)


def silhouette(image: Image.Image) -> Tensor:
    """Where the subject is, (128, 128) bool: what the background's colour does not reach from the border."""
    rgb = to_unit(image)
    return Cutout(rgb, ground_colour(rgb)).layers[3] > 0.5


def ground_colour(rgb: Tensor) -> Tensor:
    """The background's colour, (3,): the median of the outermost two pixels."""
    edge = torch.ones(PIXELS, PIXELS, dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    return rgb[:, edge].median(1).values


def core(silhouettes: Tensor) -> Tensor:
    """Silhouettes (B, H, W), of pixels worth about two units, without limbs: thin parts go, and what hung on them."""
    opened = _wider(_narrower(silhouettes.float(), 3), 3)
    middle = _narrower(opened, 11)
    grown = torch.where(middle.amax((1, 2), keepdim=True) > 0, middle, opened)
    while True:
        before = grown.sum()
        for _ in range(3):
            grown = _wider(grown, 5) * opened
        if grown.sum() == before:
            return grown > 0


def _reached(passable: Tensor) -> Tensor:
    """What of a mask (H, W) can be reached from the border, through sides of pixels, not corners."""
    passable = passable.float()[None]
    reached = passable.clone()
    reached[:, 1:-1, 1:-1] = 0
    while True:
        before = reached.sum()
        for _ in range(8):
            across = F.max_pool2d(reached, (1, 3), 1, (0, 1))
            reached = torch.maximum(across, F.max_pool2d(reached, (3, 1), 1, (1, 0))) * passable
        if reached.sum() == before:
            return reached[0] > 0


def _wider(masks: Tensor, size: int) -> Tensor:
    rows = F.max_pool2d(masks, (1, size), 1, (0, size // 2))
    return F.max_pool2d(rows, (size, 1), 1, (size // 2, 0))


def _narrower(masks: Tensor, size: int) -> Tensor:
    return 1 - _wider(1 - masks, size)
