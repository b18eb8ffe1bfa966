"""What happens to pictures on their way to a captioner, on the device and without waiting for it.

Pictures are (B, 3, H, W) in [-1, 1]. Every function draws its own strength for each picture.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalized(pictures: Tensor) -> Tensor:
    """As CLIP's and BLIP's processors scale them."""
    channels = zip(pictures.unbind(1), CLIP_MEAN, CLIP_STD, strict=True)
    return torch.stack([((channel + 1) / 2 - mean) / std for channel, mean, std in channels], 1)


def moved(pictures: Tensor, zoom: float, shift: float, turn: float = 0.0) -> Tensor:
    """Zoomed by up to 1 / (1 ± zoom), shifted by up to `shift` of half the width, turned by up to `turn` degrees.

    The border is continued, so plain backgrounds stay plain."""
    size = 1 + zoom * _signed(pictures)
    angle = math.radians(1) * turn * _signed(pictures)
    rows = torch.stack([size * angle.cos(), -size * angle.sin(), shift * _signed(pictures)], -1)
    columns = torch.stack([size * angle.sin(), size * angle.cos(), shift * _signed(pictures)], -1)
    grid = F.affine_grid(torch.stack([rows, columns], 1), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)


def worn(pictures: Tensor) -> Tensor:
    """As pictures come out of cameras, messengers and careless hands: half of each batch, each in some of the ways."""
    spoilt = sometimes(pictures, moved(pictures, zoom=0.3, shift=0.3, turn=12), 0.5)
    spoilt = sometimes(spoilt, shaded(spoilt), 0.6)
    spoilt = sometimes(spoilt, blurred(spoilt), 0.5)
    spoilt = sometimes(spoilt, noisy(spoilt), 0.5)
    spoilt = sometimes(spoilt, compressed(spoilt), 0.5)
    return sometimes(pictures, spoilt.clamp(-1, 1), 0.5)


def sometimes(pictures: Tensor, changed: Tensor, chance: float) -> Tensor:
    return torch.where(_each(torch.rand(len(pictures), device=pictures.device) < chance), changed, pictures)


def shaded(pictures: Tensor) -> Tensor:
    """Light from one side, over or under exposed, with a tint."""
    b, _, h, w = pictures.shape
    angle = math.pi * _signed(pictures)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, h, device=pictures.device),
        torch.linspace(-1, 1, w, device=pictures.device),
        indexing="ij",
    )
    slope = _each(angle.cos()) * x + _each(angle.sin()) * y
    light = 1 + 0.2 * _each(_signed(pictures)) * slope + 0.15 * _each(_signed(pictures))
    tint = 1 + 0.05 * (2 * torch.rand(b, 3, 1, 1, device=pictures.device) - 1)
    return (pictures + 1) * light * tint - 1


def blurred(pictures: Tensor) -> Tensor:
    """A Gaussian of up to two pixels, made of a fixed strong one and the picture itself."""
    taps = torch.exp(-0.5 * (torch.arange(-4, 5, device=pictures.device) / 1.6) ** 2)
    taps = (taps / taps.sum()).expand(3, 1, 1, 9).contiguous()
    soft = F.conv2d(F.pad(pictures, (4, 4, 0, 0), mode="replicate"), taps, groups=3)
    soft = F.conv2d(F.pad(soft, (0, 0, 4, 4), mode="replicate"), taps.transpose(2, 3), groups=3)
    return torch.lerp(pictures, soft, _each(torch.rand(len(pictures), device=pictures.device)))


def noisy(pictures: Tensor) -> Tensor:
    return pictures + 0.12 * _each(torch.rand(len(pictures), device=pictures.device)) * torch.randn_like(pictures)


def compressed(pictures: Tensor) -> Tensor:
    """JPEG's damage: 8 x 8 cosine blocks, the finer ones quantised the more. Height and width are multiples of 8."""
    b, c, h, w = pictures.shape
    k = torch.arange(8, device=pictures.device, dtype=pictures.dtype)
    basis = torch.cos(math.pi / 8 * (k[None] + 0.5) * k[:, None]) / 2
    basis = torch.cat([basis[:1] / math.sqrt(2), basis[1:]])
    blocks = pictures.reshape(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    waves = basis @ blocks @ basis.T
    strength = 2 * torch.rand(b, 1, 1, 1, 1, 1, device=pictures.device) + 0.05
    step = strength * (0.1 + 0.06 * (k[:, None] + k[None]))
    waves = (waves / step).round() * step
    return (basis.T @ waves @ basis).transpose(3, 4).reshape(b, c, h, w)


def _signed(pictures: Tensor) -> Tensor:
    """A number in [-1, 1] for each picture."""
    return 2 * torch.rand(len(pictures), device=pictures.device) - 1


def _each(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]
