"""Colours as they are seen, and drawings of which a part may have any colour.

Pictures are (..., 3, H, W) in [0, 1], drawings (..., H, W, 4), RGB and alpha in [0, 1]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.tiny_base.palette import COATS, to_rgb

DISTINCT = 20  # Lab: a difference of that size counts half, a much larger one no more than 1

_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_XYZ = _XYZ / _XYZ.sum(1, keepdim=True)  # white is (1, 1, 1)


def to_lab(rgb: Tensor) -> Tensor:
    """CIELAB (D65) of sRGB, channels third from the end."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,...jhw->...ihw", _XYZ, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Of Lab colours, over dimension -3: from 0 to 1, saturating, so that no pixel outweighs many others."""
    squares = (a - b).square().sum(-3) / DISTINCT**2
    return squares / (1 + squares)


def palette_lab(palette: dict) -> Tensor:
    """CIELAB of all of its colours, (names, 3)."""
    return to_lab(torch.stack([to_tensor(colour) for colour in palette.values()])[..., None, None])[..., 0, 0]


def nearest(colour: Tensor, palette: dict) -> str:
    """The name of what is nearest to a colour (3,) in [0, 1]."""
    distances = (palette_lab(palette) - to_lab(colour[:, None, None])[:, 0, 0]).norm(dim=1)
    return list(palette)[int(distances.argmin())]


def to_tensor(colour: str | tuple[int, int, int]) -> Tensor:
    """(3,) in [0, 1] of "#rrggbb" or of three of 255."""
    return torch.tensor(to_rgb(colour) if isinstance(colour, str) else colour) / 255


BODY_ENDS = ("#000000", "#ffffff")
COAT_ENDS = (COATS["black"], COATS["white"])


@dataclass(frozen=True)
class Tinted:
    """Drawings of which a part is in a dark colour and in a light one, its two ends "#rrggbb".

    That shows them in every colour: each channel is a linear mix of the two drawings."""

    dark: Tensor  # (..., H, W, 4)
    light: Tensor
    ends: tuple[str, str]

    def pure(self) -> Tensor:
        """(..., H, W) bool: where the part's colour is seen and nothing else, not its shades, and no ink."""
        low, high = map(to_tensor, self.ends)
        shown = (self.light[..., :3] - self.dark[..., :3]) * self.light[..., 3:]
        return (shown / (high - low)).mean(-1) > 0.93

    def matched(self, placed: Tensor, palette: dict[str, str]) -> tuple[list[str], Tensor]:
        """For each drawing (B, H, W, 4) the name that fits most of what the picture (B or 1, 4, H, W) has in its part,
        and the drawings in these colours."""
        distances = difference(placed[:, None, :3], palette_lab(palette)[None, :, :, None, None])
        names = list(palette)
        names = [names[i] for i in (distances * self.pure()[:, None]).sum((2, 3)).argmin(1).tolist()]
        return names, self._coloured([palette[name] for name in names])

    def _coloured(self, colours: list[str]) -> Tensor:
        low, high = map(to_tensor, self.ends)
        share = (torch.stack([to_tensor(colour) for colour in colours]) - low) / (high - low)
        rgb = self.dark[..., :3] + share[:, None, None] * (self.light[..., :3] - self.dark[..., :3])
        return torch.cat([rgb.clamp(0, 1), self.light[..., 3:]], -1)
