"""From an image file to the pixels that training, captioning and img2img see: upright, opaque, sRGB, 8 bits."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lora_lab.errors import InputError

LARGEST = 100_000_000  # pixels; 300 MB decoded, of which SDXL would see a hundredth
BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, struct.error, zlib.error)


def open_picture(path: Path, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """The image at `path` in 8-bit sRGB, rotated by its EXIF orientation, transparent pixels on `background`.

    Of an animation it is the first frame. Raises InputError, naming the file, if it is missing, not an image, damaged,
    or over 100 megapixels."""
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


def _decode(path: Path) -> Image.Image:
    """Refuse a too large image by its header, then decode the whole file: damage is found now, not in training."""
    too_large = f"{path} has over {LARGEST // 10**6} megapixels: scale it down, 4000x4000 is plenty"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # harmless below our limit
            picture = Image.open(path)
        with picture:
            if picture.width * picture.height > LARGEST:
                raise InputError(too_large)
            picture.load()
            return picture.copy()
    except Image.DecompressionBombError as error:
        raise InputError(too_large) from error
    except FileNotFoundError as error:
        raise InputError(f"there is no picture {path}: correct the name") from error
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it a file that you may read") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not a picture despite its name: remove it from the folder") from error
    except BROKEN as error:
        raise InputError(f"{path} is cut off or damaged: copy it again or remove it from the folder") from error


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
