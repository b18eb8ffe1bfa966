"""From SVG to pixels."""

import io

import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from experiments.tiny_base.recipe import PIXELS

LUMA = (0.299, 0.587, 0.114)  # what red, green and blue add to brightness
DARK = 70  # of 255: on a background less bright than this every subject gets a light rim
RIM = 236  # of 255


def rasterize(svg: str, pixels: int = PIXELS) -> np.ndarray:
    """(pixels, pixels, 4) uint8, RGB and alpha, not premultiplied. A document that is not square is centred."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True))
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    if picture.size != (pixels, pixels):
        square = Image.new("RGBA", (pixels, pixels))
        square.paste(picture, ((pixels - picture.width) // 2, (pixels - picture.height) // 2))
        picture = square
    return np.asarray(picture)


def composite(pictures: Tensor, backgrounds: Tensor) -> Tensor:
    """Subjects (B, H, W, 4) uint8 on plain colours (B, 3) uint8: (B, 3, H, W) in [-1, 1].

    Ink is invisible on black: there a subject gets a light rim two pixels wide, as a sticker has."""
    layers = pictures.permute(0, 3, 1, 2).float()
    colour, alpha = layers[:, :3], layers[:, 3:] / 255
    ground = backgrounds.float()[:, :, None, None]
    luma = sum(weight * channel for weight, channel in zip(LUMA, ground.unbind(1), strict=True))[:, None]
    rim = F.max_pool2d(alpha, 5, stride=1, padding=2) * (luma < DARK)
    ground = ground + (RIM - ground) * rim
    return (ground + (colour - ground) * alpha) / 127.5 - 1


def picture(svg: str, background: tuple[int, int, int]) -> Image.Image:
    """One document on one background, as the models see it."""
    subject = torch.from_numpy(rasterize(svg).copy())[None]
    pixels = composite(subject, torch.tensor([background], dtype=torch.uint8))[0]
    return to_image(pixels)


def to_unit(image: Image.Image) -> Tensor:
    """A picture as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_pixels(image: Image.Image) -> Tensor:
    """A picture as (3, H, W) in [-1, 1], as the models see it."""
    return 2 * to_unit(image) - 1


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to 8-bit RGB."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())
