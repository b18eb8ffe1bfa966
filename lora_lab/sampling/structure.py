"""Control images and masks of photos: what the requests of img2img keep of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lora_lab.base.locate import locate_folder
from lora_lab.base.protocol import BaseModel
from lora_lab.errors import InputError
from lora_lab.images.detect import depth_maps, skeletons
from lora_lab.images.edges import canny
from lora_lab.images.masking import feathered, subjects_of
from lora_lab.images.pixels import fit, open_picture
from lora_lab.images.scan import find_pictures
from lora_lab.sampling.generate import Control
from lora_lab.settings.schema import Likeness, Memory, Structure


def check_conditions(
    structure: Structure, likeness: Likeness, memory: Memory, base: type[BaseModel], name: str
) -> None:
    """Raise InputError where the base model called `name` cannot do what `structure` or `likeness` ask for."""
    for group, kind in (("structure", structure.kind), ("likeness", likeness.kind)):
        if kind != "off" and not hasattr(base, "load_control"):
            raise InputError(f"{group}={kind}: model={name} takes no control images and no photos, set {group}=off")
    if likeness.kind != "off" and {memory.linear_weights, memory.convolution_weights} != {"base"}:
        raise InputError(
            f"likeness={likeness.kind}: an IP-Adapter needs the UNet in the base's precision, set "
            "memory.linear_weights=base memory.convolution_weights=base"
        )


def controls_of(
    structure: Structure, paths: Sequence[Path], photos: Sequence[Image.Image], device: torch.device
) -> list[Control | None]:
    """The control of each photo, an RGB image that was cut to its bucket from the file in `paths`; None without one.

    Raises InputError for an image that is missing or does not fit its photo, for a detector that cannot be loaded, and
    for a photo without a person to take the pose of."""
    if structure.kind == "off":
        return [None] * len(photos)
    if structure.images:
        images = _prepared("structure.images", structure.images, paths, photos)
    elif structure.kind == "canny":
        images = [canny(photo, structure.low, structure.high) for photo in photos]
    elif structure.kind == "tile":
        images = list(photos)
    else:
        detect = depth_maps if structure.kind == "depth" else skeletons
        images = detect("structure.detector", structure.detector, photos, device)
    for path, image in zip(paths, images, strict=True):
        if image is None:
            raise InputError(f"{path}: no person was found whose pose structure=pose could keep, use another structure")
    return [Control(image, structure.scale, structure.end) for image in images]


def masks_of(
    mask: str | None,
    feather: float,
    segmenter: str | None,
    paths: Sequence[Path],
    photos: Sequence[Image.Image],
    device: torch.device,
) -> list[Image.Image | None]:
    """The mask (mode L, 255 is drawn) of each photo, as those of `controls_of`; None without one.

    `mask` is `person`, `background`, or the place of images whose white is drawn. The edges are those of `feathered`,
    so that no contour of the photo stays. Without a `segmenter` the background is what is joined to the border and has
    its plain colour. Raises InputError as `controls_of` does, and for a mask with which nothing would be drawn."""
    if mask is None:
        return [None] * len(photos)
    if mask in ("person", "background"):
        selected = [*subjects_of(segmenter, photos, device)]
    else:
        selected = [np.asarray(image.convert("L")) > 127 for image in _prepared("stage.mask", mask, paths, photos)]
    drawn = []
    for path, inside in zip(paths, selected, strict=True):
        if inside is None:
            raise InputError(
                f"stage.mask={mask}: {path} has no plain background, name a segmentation model with model.segmenter= "
                "or a mask with stage.mask=FILE"
            )
        if not inside.any() or (mask == "background" and inside.all()):
            raise InputError(f"stage.mask={mask}: nothing of {path} would be drawn, use another mask")
        drawn.append(feathered(inside, feather, outside=mask == "background"))
    return drawn


def _prepared(key: str, value: str, paths: Sequence[Path], photos: Sequence[Image.Image]) -> list[Image.Image]:
    """For each photo the image at `value`, or of its name in that folder, cut as the photo was."""
    place = locate_folder(key, value)
    files = {Path(name).stem: path for name, path in find_pictures(place, key).items()} if place.is_dir() else {}
    images = []
    for path, photo in zip(paths, photos, strict=True):
        file = files.get(path.stem) if place.is_dir() else place
        if file is None:
            raise InputError(f"{key}={value}: it has no image for {path.name}, add {path.stem}.png")
        image, whole = open_picture(file), open_picture(path).size
        if abs(image.width * whole[1] / (image.height * whole[0]) - 1) > 0.02:
            sizes = f"{image.width}x{image.height}, but {path} is {whole[0]}x{whole[1]}"
            raise InputError(f"{file} is {sizes}: give it the shape of its photo")
        images.append(fit(image, photo.size).picture)
    return images
