"""Aspect-ratio buckets: few sizes of about equal area, so that images can be batched and little is cropped away.

SDXL is conditioned on the original size of each image and on the corner of its crop (micro-conditioning: Podell et al.
2023, arXiv 2307.01952, section 2.2); buckets are the multi-aspect training of section 2.3."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from lora_lab.errors import InputError

Size = tuple[int, int]  # (width, height) in pixels, as in Pillow
LATENT_PIXEL = 8  # image pixels per latent pixel of SDXL's VAE; crops closer than that show the same


@dataclass(frozen=True)
class Fitted:
    """An image of its bucket's size, and SDXL's three conditions: (height, width) or (top, left), in pixels."""

    picture: Image.Image
    original_size: tuple[int, int]  # (height, width) of the file
    crop_top_left: tuple[int, int]  # (top, left) of the crop in the resized image
    target_size: tuple[int, int]  # (height, width) of the bucket
    mirrored_top_left: tuple[int, int]  # crop_top_left of the mirrored image
    mask: Image.Image | None = None  # mode L, of the bucket's size; 255 is trained on, None is the whole image


def aspect_buckets(resolution: int, step: int, max_ratio: float = 2.0) -> list[Size]:
    """(width, height) in pixels of every bucket, tall to wide: multiples of `step`, of at most resolution**2 pixels.

    The square is always included; no side is longer than `max_ratio` times the other.
    Raises InputError if the resolution is too low for any bucket."""
    if resolution < step:
        raise InputError(f"resolution={resolution} is below {step}, the smallest side that the model accepts: raise it")
    side = resolution // step * step
    buckets = {(side, side)}
    for short in range(step, side + 1, step):
        long = resolution**2 // (short * step) * step
        if long <= max_ratio * short:
            buckets |= {(short, long), (long, short)}
    return sorted(buckets, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket with the aspect ratio nearest to that of `size`, by logarithms: 2:1 is as far from 1:1 as 1:2."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0]))))


def enlargement(size: Size, bucket: Size) -> float:
    """The factor by which `size` is scaled to cover `bucket`; above 1 the image is blurred."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def fit(picture: Image.Image, bucket: Size, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Fitted:
    """Scale the image to cover `bucket` and crop the centre; an image of that size stays unchanged."""
    return fit_crops(picture, bucket, 1, resample)[0]


def fit_crops(
    picture: Image.Image, bucket: Size, most: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> list[Fitted]:
    """Up to `most` crops like that of `fit`, spread evenly from edge to edge, so that the whole image is seen.

    Crops are at least a latent pixel apart; an image too small for two is cropped at its centre."""
    scaled, (left, top) = _cover(picture, bucket, resample)
    count = min(most, 1 + max(left, top) // LATENT_PIXEL)
    if count == 1:
        place = (top // 2, left // 2)
        # the crop of the mirrored image may lie one pixel further to the right, which makes no difference
        return [_cut(picture, scaled, bucket, place, place)]
    places = [(round(i * top / (count - 1)), round(i * left / (count - 1))) for i in range(count)]
    return [_cut(picture, scaled, bucket, (y, x), (y, left - x)) for y, x in places]


def _cover(picture: Image.Image, bucket: Size, resample: Image.Resampling) -> tuple[Image.Image, Size]:
    """The image scaled to cover the bucket, and how many pixels it is wider and higher."""
    scale = enlargement(picture.size, bucket)
    # rounding may fall a pixel short of the bucket on the side that decides the scale
    covering = tuple(max(goal, round(side * scale)) for goal, side in zip(bucket, picture.size, strict=True))
    return picture.resize(covering, resample), (covering[0] - bucket[0], covering[1] - bucket[1])


def _cut(
    picture: Image.Image, scaled: Image.Image, bucket: Size, place: tuple[int, int], mirrored: tuple[int, int]
) -> Fitted:
    top, left = place
    cut = scaled.crop((left, top, left + bucket[0], top + bucket[1]))
    return Fitted(cut, (picture.height, picture.width), place, (bucket[1], bucket[0]), mirrored)
