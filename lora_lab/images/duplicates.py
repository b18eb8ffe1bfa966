"""Copies of an image: found by a perceptual hash and by colours, whatever their size and compression."""

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Measured on the 24 bundled tofu images, which differ by a wink or a hat. Of the 16x16 bits of the hash, the two most
# similar images differ in 26, and a copy (JPEG quality 30 or 75; 64 to 1024 px, bilinear or Lanczos) differs from its
# original in at most 8. Copies shrunk by nearest neighbour (up to 22) are not found. The usual hash of 8x8 bits cannot
# separate them: 2 for the two most similar images, 2 for copies.
HASH_SIDE, HASH_BITS = 16, 14
# The hash is of grey values only, so colours are compared too: mean difference of 16x16 thumbnails, 0 to 255; 2.8 at
# most between a copy and its original.
COLOUR = 8.0


@dataclass(frozen=True)
class Thumbnail:
    """The features by which copies of an image are recognised."""

    bits: np.ndarray  # perceptual hash, bool (16, 16)
    colours: np.ndarray  # float (16, 16, 3), 0 to 255


def thumbnail(image: Image.Image) -> Thumbnail:
    """The features of an RGB image of any size."""
    import imagehash  # imports scipy: other stages do without

    small = image.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    return Thumbnail(imagehash.phash(image, hash_size=HASH_SIDE).hash, np.asarray(small, dtype=np.float64))


def find_duplicates(thumbnails: Mapping[str, Thumbnail]) -> list[tuple[str, str]]:
    """(copy, original) for each image that equals an earlier one but for scale and compression."""
    originals: dict[Hashable, list[str]] = defaultdict(list)
    copies = []
    for name, features in thumbnails.items():
        keys = _keys(features)
        similar = dict.fromkeys(other for key in keys for other in originals[key])
        original = next((other for other in similar if _are_copies(features, thumbnails[other])), None)
        if original is None:
            for key in keys:
                originals[key].append(name)
        else:
            copies.append((name, original))
    return copies


def _keys(features: Thumbnail) -> list[Hashable]:
    """Keys of which a copy shares at least one: it differs in at most HASH_BITS bits, so one of HASH_BITS + 1 parts of
    the hash is equal; and in brightness by at most COLOUR, so in one of two shifted grids it lies in the same cell.

    Comparing all images with all would be quadratic."""
    parts, brightness = np.array_split(features.bits.ravel(), HASH_BITS + 1), features.colours.mean()
    cells = [(shift, int((brightness + shift) // (2 * COLOUR))) for shift in (0, COLOUR)]
    return [(i, part.tobytes(), cell) for i, part in enumerate(parts) for cell in cells]


def _are_copies(one: Thumbnail, two: Thumbnail) -> bool:
    bits, colours = np.count_nonzero(one.bits != two.bits), np.abs(one.colours - two.colours).mean()
    return bits <= HASH_BITS and colours <= COLOUR
