"""From an image file to the pixels that the program uses, and to the size that they are trained in.

Pixels are upright, opaque, sRGB, 8 bits. Sizes are aspect-ratio buckets: few sizes of about equal area, so that images
can be batched and little is cropped away. SDXL is conditioned on the original size of each image and on the corner of
its crop (micro-conditioning: Podell et al. 2023, arXiv 2307.01952, section 2.2); buckets are the multi-aspect training
of section 2.3."""

import io
import math
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lora_lab.errors import InputError
from lora_lab.images.scan import readable_formats, why_not_read

LARGEST = 100_000_000  # pixels; 300 MB decoded, of which SDXL would see a hundredth
LONGEST = 100  # times the other side; scaled to cover a bucket, an image has up to half as many pixels as LARGEST
BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, struct.error, zlib.error)


def open_picture(path: Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The image at `path` in 8-bit sRGB, rotated by its EXIF orientation, transparent pixels on `background`.

    Of an animation it is the first frame. Raises InputError, naming the file, if it is missing, not an image, damaged,
    over 100 megapixels, or longer than 100 times its other side."""
    return open_with_alpha(path, background)[0]


def open_with_alpha(
    path: Path, background: tuple[int, int, int] = (255, 255, 255)
) -> tuple[Image.Image, Image.Image | None]:
    """The image of `open_picture` and its alpha channel (mode L, 255 is opaque), None for an image without one.

    Raises InputError as `open_picture` does."""
    picture = _decode(path)
    profile = picture.info.get("icc_profile")
    try:
        picture = _upright(picture)
        alpha = None
        if picture.has_transparency_data:
            # under alpha 0 there may be any colour, which convert("RGB") would reveal
            picture = picture.convert("RGBA")
            alpha = picture.getchannel("A")
        picture = _srgb(_eight_bits(picture), profile)
    except BROKEN as error:
        raise InputError(f"{path} has colours in an unusual form ({error}): save it again as a PNG") from error
    if alpha is None:
        return picture, None
    return Image.composite(picture, Image.new("RGB", picture.size, background), alpha), alpha


def count_frames(path: Path) -> int:
    """The frames of an animation or the pages of a TIFF, of which the first is used; 1 for any other image.

    Raises InputError as `open_picture` does."""
    with _opened(path) as picture:
        # an MPO of a phone has a preview, a depth or a gain map beside the one image
        return 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)


def is_blank(picture: Image.Image, alpha: Image.Image | None) -> bool:
    """Whether the image of `open_with_alpha` is black or transparent all over."""
    return picture.getbbox() is None or (alpha is not None and alpha.getbbox() is None)


def _decode(path: Path) -> Image.Image:
    """Decode the whole file: damage is found now, not in training."""
    with _opened(path) as picture:
        picture.load()
        return picture.copy()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Within the context the image file at `path`, of which only the header was read. Errors are InputErrors."""
    too_large = f"{path} has over {LARGEST // 10**6} megapixels: scale it down, 4000x4000 is plenty"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # opening a FIFO would hang
            raise InputError(f"{path} is a FIFO, socket or device, which is never opened: remove it")
        if not status.st_size:
            raise InputError(f"{path} is empty (0 bytes): copy it again or remove it from the folder")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's of damaged tags, and of sizes below our limit
            with Image.open(path, formats=_formats()) as picture:
                if picture.width * picture.height > LARGEST:
                    raise InputError(too_large)
                if max(picture.size) > LONGEST * min(picture.size):
                    size = f"{picture.width}x{picture.height}"
                    raise InputError(f"{path} is {size}, one side over {LONGEST} times the other: crop it")
                yield picture
    except Image.DecompressionBombError as error:
        raise InputError(too_large) from error
    except FileNotFoundError as error:
        raise InputError(f"there is no picture {path}: correct the name") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it a file that you may read") from error
    except UnidentifiedImageError as error:
        reason = why_not_read(path.suffix.lower()) or "not a picture despite its name: remove it from the folder"
        raise InputError(f"{path} is {reason}") from error
    except BROKEN as error:
        raise InputError(f"{path} is cut off or damaged: copy it again or remove it from the folder") from error


def _formats() -> list[str]:
    """Pillow's names of the formats that a file may have, whatever its suffix. No other decoder sees a file of a
    stranger: that of EPS would start Ghostscript."""
    formats = list(dict.fromkeys(readable_formats().values()))
    if "HEIF" in formats and "HEIF" not in Image.OPEN:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return formats


def _upright(picture: Image.Image) -> Image.Image:
    """The image rotated by its EXIF orientation; a broken EXIF block is ignored."""
    try:
        return ImageOps.exif_transpose(picture)
    except BROKEN:
        return picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    """L, RGB or CMYK with 8 bits per channel: 16-bit grey is scaled, where convert("L") would clip it to white."""
    if picture.mode.startswith("I;16"):
        return _scaled(picture, 65535)
    if picture.mode in ("I", "F"):  # no fixed range: the smallest common one that contains the values
        peak = float(np.asarray(picture).max())
        return _scaled(picture, next(top for top in (1, 255, 65535, peak) if peak <= top))
    return picture if picture.mode in ("L", "RGB", "CMYK") else picture.convert("RGB")


def _scaled(picture: Image.Image, top: float) -> Image.Image:
    grey = np.asarray(picture).astype(np.float64) * (255 / top)
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


def _srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB: phones embed Display P3 profiles and printers CMYK profiles, which SDXL ignores."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile, or one for another mode: viewers ignore it too
    return picture.convert("RGB")


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


def open_fitted(path: Path, buckets: Sequence[Size]) -> Image.Image:
    """The image file, cut to the nearest of `buckets` (width, height). Raises InputError as open_picture does."""
    picture = open_picture(path)
    return fit(picture, nearest_bucket(picture.size, buckets)).picture


def enlargement(size: Size, bucket: Size) -> float:
    """The factor by which `size` is scaled to cover `bucket`; above 1 the image is blurred."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def cut_away(size: Size, bucket: Size) -> float:
    """The share of the pixels of an image of `size` that `fit` cuts away for `bucket`, 0 to 1."""
    scale = enlargement(size, bucket)
    return 1 - bucket[0] * bucket[1] / (scale**2 * size[0] * size[1])


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
