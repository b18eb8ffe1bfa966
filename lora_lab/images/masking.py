"""Masks of the person, the foreground or the background of images, and the record of those that the program wrote."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy.ndimage import binary_propagation, distance_transform_edt

from lora_lab.captions.history import append_rows, read_rows
from lora_lab.errors import InputError
from lora_lab.images.scan import leads_out
from lora_lab.runs import hash_content, write_atomically

if TYPE_CHECKING:
    import torch

PLAIN = 12  # of 255: how far a plain background may be from the colour of the border
PLAIN_BORDER = 0.5  # fraction of the border that has this colour
RECORD = "masks.jsonl"  # in the folder of masks: a row for each that the program wrote
ROW = ("file_name", "mask", "sha256", "by")


def subjects_of(
    segmenter: str | None, photos: Iterable[Image.Image], device: "torch.device"
) -> Iterator[np.ndarray | None]:
    """Where each RGB photo shows its person (H, W), boolean, by the model `segmenter`, one after the other.

    Without one its foreground, None where it has no plain background. Raises InputError for a model that cannot be
    loaded."""
    if segmenter is None:
        return map(foreground, photos)
    from lora_lab.images.detect import people

    return people("model.segmenter", segmenter, photos, device)


def foreground(photo: Image.Image) -> np.ndarray | None:
    """What does not have the colour of the border, or is surrounded by what has not (H, W), boolean; None where the
    border has no plain colour."""
    pixels = np.asarray(photo).astype(np.int16)
    border = np.ones(pixels.shape[:2], bool)
    border[1:-1, 1:-1] = False
    near = np.abs(pixels - np.median(pixels[border], axis=0)).max(2) <= PLAIN
    if near[border].mean() < PLAIN_BORDER:
        return None
    return ~binary_propagation(border & near, mask=near)


def feathered(inside: np.ndarray, feather: float, outside: bool = False) -> Image.Image:
    """The mask (mode L) of `inside` (H, W), boolean, or of what is `outside` of it.

    It is larger by `feather` times the shorter side, so that it covers the contour, and falls to 0 over as much again;
    one of the outside only rises from the contour over as much."""
    distance = distance_transform_edt(~inside)  # px
    grown = 1 if outside else 2  # in units of feather
    levels = np.clip(grown - distance / max(feather * min(inside.shape), 1e-6), 0, 1)
    levels = 1 - levels if outside else levels
    return Image.fromarray((levels * 255).round().astype(np.uint8))


def write_mask(folder: Path, name: str, mask: Image.Image, by: str) -> Path:
    """Write the mask of the image `name` into `folder`, after its row in the record; returns its path.

    Raises InputError for a record that is a link, and for a folder below that leads elsewhere."""
    path, content = (folder / name).with_suffix(".png"), io.BytesIO()
    if leads_out(path.parent, folder):
        raise InputError(f"{path.parent}: this link leads out of {folder}: remove it")
    mask.save(content, "PNG")
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    place = path.relative_to(folder).as_posix()
    append_rows(folder / RECORD, [dict(zip(ROW, (name, place, digest, by), strict=True))])
    return write_atomically(path, lambda temporary: temporary.write_bytes(content.getvalue()))


def machine_masks(folder: Path) -> set[Path]:
    """The masks in `folder` that are byte for byte as the program wrote them; any other is a person's."""
    written: dict[Path, set[str]] = {}
    for row in read_rows(folder / RECORD, ROW):
        written.setdefault(folder / row["mask"], set()).add(row["sha256"])
    return {path for path, digests in written.items() if path.is_file() and hash_content(path) in digests}
