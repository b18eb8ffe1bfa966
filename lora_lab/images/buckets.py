"""Aspect-ratio buckets: few shapes of about equal area, so that batches stack and little is cropped away.

SDXL is told what was done to each picture (micro-conditioning: Podell et al. 2023, arXiv 2307.01952, section 2.2):
its original size and the crop's corner; buckets are the multi-aspect training of section 2.3."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from lora_lab.errors import InputError

Size = tuple[int, int]  # (width, height) in pixels, as Pillow has it
LATENT_PIXEL = 8  # pixels of the picture, in SDXL's VAE; crops that are nearer to each other show the same


@dataclass(frozen=True)
class Fitted:
    """A picture in its bucket, and SDXL's three conditions: (height, width) or (top, left), in pixels.

    A mask (L, of the bucket's size too) says what of it is learnt; None is all."""

    picture: Image.Image
    original_size: tuple[int, int]  # (height, width) of the file
    crop_top_left: tuple[int, int]  # (top, left) of the crop in the resized picture
    target_size: tuple[int, int]  # (height, width) of the bucket
    mirrored_top_left: tuple[int, int]  # crop_top_left of the mirrored picture
    mask: Image.Image | None = None


def aspect_buckets(resolution: int, step: int, max_ratio: float = 2.0) -> list[Size]:
    """(width, height) of every bucket, tall to wide: multiples of `step`, as large as fits in resolution**2 pixels.

    The square is always there; no bucket is longer than `max_ratio` times its shorter side.
    Raises InputError when the resolution holds no bucket at all."""
    if resolution < step:
        raise InputError(f"resolution={resolution} is below {step}, the smallest side that the model takes: raise it")
    side = resolution // step * step
    buckets = {(side, side)}
    for short in range(step, side + 1, step):
        long = resolution**2 // (short * step) * step
        if long <= max_ratio * short:
            buckets |= {(short, long), (long, short)}
    return sorted(buckets, key=lambda size: (size[0] / size[1], size))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest to `size`'s, in logarithms: 2:1 is as far from 1:1 as 1:2 is."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0]))))


def enlargement(size: Size, bucket: Size) -> float:
    """By how much `size` is scaled to cover `bucket`; above 1 the missing detail is invented."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def fit(picture: Image.Image, bucket: Size, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Fitted:
    """Scale the picture to cover `bucket` and cut out the centre; a picture of that size already passes untouched."""
    return fit_crops(picture, bucket, 1, resample)[0]


def fit_crops(
    picture: Image.Image, bucket: Size, most: int, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> list[Fitted]:
    """`fit` at up to `most` places, evenly from edge to edge of what is larger than `bucket`, so that all is seen.

    Places are a latent pixel apart at least; a picture that has no room for two is cut at its centre."""
    scaled, (left, top) = _cover(picture, bucket, resample)
    count = min(most, 1 + max(left, top) // LATENT_PIXEL)
    if count == 1:
        place = (top // 2, left // 2)
        # the crop of the mirrored picture may lie one pixel further to the right, which nobody needs to be told
        return [_cut(picture, scaled, bucket, place, place)]
    places = [(round(i * top / (count - 1)), round(i * left / (count - 1))) for i in range(count)]
    return [_cut(picture, scaled, bucket, (y, x), (y, left - x)) for y, x in places]


def _cover(picture: Image.Image, bucket: Size, resample: Image.Resampling) -> tuple[Image.Image, Size]:
    """The picture scaled to cover the bucket, and by how much it is wider and higher."""
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
