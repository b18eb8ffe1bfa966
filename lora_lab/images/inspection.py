"""What a dataset contains, read image by image and caption by caption by the functions that training uses."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_lab.captions.files import Texts, read_caption_lists
from lora_lab.captions.phrases import common_phrases
from lora_lab.errors import InputError
from lora_lab.images.dataset import Masks, folder_prefix
from lora_lab.images.duplicates import Thumbnail, find_duplicates, thumbnail
from lora_lab.images.pixels import Size, enlargement, nearest_bucket, open_picture
from lora_lab.images.scan import find_pictures, same_names, unsupported

T = TypeVar("T")
CLIP_WINDOW = 77  # tokens, with the start and end markers


@dataclass(frozen=True)
class Findings:
    """What a dataset contains. Names are names of images, in natural order, as training has them."""

    pictures: int
    captions: int
    buckets: dict[str, int]  # "832x1216" (width x height) -> number of images
    unreadable: dict[str, str]  # name -> reason
    unmasked: dict[str, str]  # name -> why its mask cannot be used; {} without masks
    uncaptioned: list[str]
    pictureless: list[str]  # captions without an image
    caption_files: str  # why no captions could be read; "" if they could
    same_name: list[str]  # on disk twice, NFC and NFD
    same_but_case: list[tuple[str, ...]]
    unsupported: list[str]
    enlarged: dict[str, float]  # name -> scale, above 1
    duplicates: list[tuple[str, str]]  # (copy, original)
    without_trigger: list[str]
    too_long: dict[str, int]  # name -> tokens, above 77
    in_every_caption: list[str]


def inspect_dataset(
    roots: Sequence[Path],
    trigger: str,
    buckets: Sequence[Size],
    masks: Masks | None = None,
    training_text: Callable[[str], str] = str,
    count_tokens: Callable[[str], int] | None = None,
) -> Findings:
    """Open every image and read every caption in the folders of `roots`.

    `training_text` is the text that training makes of a caption, `count_tokens` the tokenizer of the base, start and
    end markers included. Raises InputError for a folder without images; all other faults are findings."""
    folders = {folder_prefix(root, roots): root for root in roots}
    paths = _prefixed({prefix: find_pictures(root) for prefix, root in folders.items()})
    captions, caption_files = _read_captions(folders)
    sizes, thumbnails, unreadable = _open_all(paths)
    nearest = {name: nearest_bucket(size, buckets) for name, size in sizes.items()}
    scales = {name: enlargement(size, nearest[name]) for name, size in sizes.items()}
    texts = {name: [training_text(text) for text in image_captions] for name, image_captions in captions.items()}
    tokens = {name: max(map(count_tokens, texts[name])) for name in texts} if count_tokens else {}
    whole_trigger = re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)")
    similar = {prefix: same_names(root) for prefix, root in folders.items()}
    return Findings(
        pictures=len(paths),
        captions=sum(map(len, captions.values())),
        buckets={f"{width}x{height}": n for (width, height), n in Counter(nearest.values()).most_common()},
        unreadable=unreadable,
        unmasked=_unmasked(masks, paths, sizes) if masks else {},
        uncaptioned=[] if caption_files else [name for name in paths if name not in captions],
        pictureless=[name for name in captions if name not in paths],
        caption_files=caption_files,
        same_name=[prefix + name for prefix, (twice, _) in similar.items() for name in twice],
        same_but_case=[
            tuple(prefix + name for name in names) for prefix, (_, groups) in similar.items() for names in groups
        ],
        unsupported=[prefix + name for prefix, root in folders.items() for name in unsupported(root)],
        enlarged={name: round(scale, 2) for name, scale in scales.items() if scale > 1},
        duplicates=find_duplicates(thumbnails),
        without_trigger=[name for name in texts if not all(map(whole_trigger.search, texts[name]))],
        too_long={name: count for name, count in tokens.items() if count > CLIP_WINDOW},
        in_every_caption=common_phrases([text for texts in captions.values() for text in texts], trigger),
    )


def _open_all(paths: Mapping[str, Path]) -> tuple[dict[str, Size], dict[str, Thumbnail], dict[str, str]]:
    """Sizes and thumbnails by name, and why the others cannot be opened; one image is in memory at a time."""
    sizes, thumbnails, unreadable = {}, {}, {}
    for name, path in paths.items():
        try:
            image = open_picture(path)
        except InputError as error:
            unreadable[name] = str(error)
        else:
            sizes[name] = image.size
            thumbnails[name] = thumbnail(image)
    return sizes, thumbnails, unreadable


def _unmasked(masks: Masks, paths: Mapping[str, Path], sizes: Mapping[str, Size]) -> dict[str, str]:
    """Name -> why training would refuse the image's mask."""
    faults = {}
    for name, size in sizes.items():
        try:
            masks.open(name, paths[name], size)
        except InputError as error:
            faults[name] = str(error)
    return faults


def _read_captions(folders: Mapping[str, Path]) -> tuple[dict[str, Texts], str]:
    """Captions by name, and why those of some folders cannot be read, "" if all can."""
    captions, reasons = {}, []
    for prefix, root in folders.items():
        try:
            captions[prefix] = read_caption_lists(root)
        except InputError as error:
            reasons.append(str(error))
    return _prefixed(captions), "; ".join(reasons)


def _prefixed(folders: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """The entries of every folder, their names behind the folder's prefix."""
    return {prefix + name: value for prefix, entries in folders.items() for name, value in entries.items()}
