"""stage=mask: write masks of the images of a folder, for loss.mask. A mask that a person made is never overwritten."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from lora_lab import demo
from lora_lab.base.load import pick_device
from lora_lab.base.locate import locate_folder, writable_folder
from lora_lab.console import bar, say
from lora_lab.errors import InputError
from lora_lab.images.dataset import list_names, say_unused
from lora_lab.images.masking import feathered, machine_masks, subjects_of, write_mask
from lora_lab.images.pixels import open_picture
from lora_lab.images.scan import find_pictures, pictures
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import display_path, write_atomically
from lora_lab.settings.schema import Config

CELL = 256  # px, of the sheet
MOST_ROWS = 50  # of the sheet
SQUARE, LIGHT, DARK = 8, 255, 190  # px and greys of what is seen through a cut-out


@dataclass(frozen=True)
class MaskResult:
    stage: str
    folder: str  # for loss.mask
    masks: dict[str, str]  # image name -> its new mask
    kept: int  # number of images whose mask was not changed
    without: dict[str, str]  # image name -> why it has no mask
    sheet: str | None  # path


def mask(config: Config, folder: Path) -> MaskResult:
    """Mask the images of dataset.root that `stage.mode` selects; each mask is written before the next one.

    Images without a plain background, or without a person, are named and have none. Raises InputError for an unreadable
    image, two images that would share a mask, a folder that cannot be written to or lies within that of the images, a
    model that cannot be loaded, and if no image could be masked."""
    stage, follow_links = config.stage, config.dataset.follow_links
    root = locate_folder("dataset.root", config.dataset.folder)
    paths = find_pictures(root, follow_links=follow_links)
    say_unused([root], follow_links)
    output = mask_folder(stage.output, root, folder)
    names = select_images(list(paths), output, stage.mode)
    if not names:
        say(f"all {len(paths)} pictures of {root} have a mask in {output} that stage.mode={stage.mode} does not change")
        return MaskResult("mask", str(output), {}, len(paths), {}, None)
    for name in names:
        open_picture(paths[name])
    segmenter = config.model.segmenter if stage.subject != "foreground" else None
    say(f"masking {len(names)} pictures by {segmenter or 'their plain background'}")
    photos = (open_picture(paths[name]) for name in names)
    found = subjects_of(segmenter, photos, pick_device(config.device))
    written, without, rows = {}, {}, {}
    for name, inside in zip(bar(names, desc="mask", unit="picture"), found, strict=True):
        if reason := _unusable(inside, stage.subject, segmenter):
            without[name] = reason
            continue
        drawn = feathered(inside, stage.feather, outside=stage.subject == "background")
        written[name] = str(write_mask(output, name, drawn, segmenter or "plain background"))
        if len(rows) < MOST_ROWS:
            rows[name] = sheet_row(open_picture(paths[name]), drawn)
    for line in _lines(without, output):
        say(line)
    if not written:
        raise InputError(f"dataset.root={config.dataset.folder}: none of the {len(names)} pictures could be masked")
    sheet = contact_sheet([*rows.values()], ["picture", "mask", "cut-out"], [*rows], cell=CELL)
    file = write_atomically(folder / "masks.png", sheet.save)
    shown = display_path(output)
    say(f"{len(written)} masks in {shown}, to look at in {display_path(file)}; to train: loss.mask={shown}")
    return MaskResult("mask", str(output), written, len(paths) - len(names), without, str(file))


def mask_folder(output: str | None, root: Path, folder: Path) -> Path:
    """The folder of the masks of the images in `root`, which exists then; by default beside it, of the bundled images
    in the run folder `folder`.

    Raises InputError for one that cannot be written to, and for one within the other, where masks would be images."""
    bundled = demo.HERE in root.resolve().parents
    beside = folder / "masks" if bundled else root.resolve().with_name(f"{root.resolve().name}-masks")
    path = Path(output) if output else beside
    places = (path.resolve(), root.resolve())
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        raise InputError(f"stage.output={path}: masks in there would be read as images of {root}: name another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"stage.output={path}: cannot be created ({error.strerror}): name another folder") from error
    return writable_folder("stage.output", str(path))


def select_images(names: Sequence[str], output: Path, mode: str) -> list[str]:
    """The names that `stage.mode` selects: missing or replace. Raises InputError for two images of one mask."""
    by_stem: dict[str, str] = {}
    for name in names:
        if (other := by_stem.setdefault(_stem(name), name)) != name:
            raise InputError(f"{other} and {name} would have one mask, {_stem(name)}.png: rename one of them")
    masks = {_stem(name): path for name, path in pictures(output, follow_links=True).items()}
    own = machine_masks(output) if mode == "replace" else set()
    return [name for stem, name in by_stem.items() if stem not in masks or masks[stem] in own]


def sheet_row(picture: Image.Image, drawn: Image.Image) -> list[Image.Image]:
    """An RGB picture, its mask (mode L), and what of the picture is white in it before a chequered ground; small."""
    small = picture.copy()
    small.thumbnail((CELL, CELL))
    scaled = drawn.resize(small.size)
    across, down = (np.arange(side) // SQUARE for side in small.size)
    squares = np.where((down[:, None] + across) % 2, LIGHT, DARK).astype(np.uint8)
    ground = Image.fromarray(squares).convert("RGB")
    return [small, scaled, Image.composite(small, ground, scaled)]


def _unusable(inside: np.ndarray | None, subject: str, segmenter: str | None) -> str:
    """Why an image has no mask; "" if it can have one."""
    if inside is None:
        return "no plain background: name a segmentation model, stage.subject=person model.segmenter=, or draw its mask"
    if not inside.any():
        return f"no person that {segmenter} finds: draw its mask" if segmenter else "nothing but background: remove it"
    return "no background: draw its mask" if subject == "background" and inside.all() else ""


def _lines(without: Mapping[str, str], output: Path) -> list[str]:
    """A line for each reason why images have no mask."""
    names: dict[str, list[str]] = {}
    for name, reason in without.items():
        names.setdefault(reason, []).append(name)
    return [f"without a mask in {output}: {list_names(named)} ({reason})" for reason, named in names.items()]


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
