"""What a dataset contains, read image by image and caption by caption by the functions that training uses."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_lab.captions.files import Texts, read_caption_lists
from lora_lab.captions.phrases import CommonWords, repeated_captions
from lora_lab.captions.syntax import foreign_texts, long_texts, syntax_warnings, without_trigger
from lora_lab.errors import InputError
from lora_lab.images.dataset import MOST_CUT_AWAY, Masks, folder_prefix, folder_repeats, unused_files
from lora_lab.images.duplicates import Thumbnail, find_duplicates, thumbnail
from lora_lab.images.pixels import (
    Size,
    count_frames,
    cut_away,
    enlargement,
    is_blank,
    nearest_bucket,
    open_with_alpha,
)
from lora_lab.images.scan import find_contents, same_but_case
from lora_lab.settings.sections import WINDOWS, Triggers

T = TypeVar("T")


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
    unused: dict[str, str]  # file, or folder with a slash -> what it is and what to do
    enlarged: dict[str, float]  # name -> scale, above 1
    cut_away: dict[str, float]  # name -> share of its pixels outside its bucket, above 0.25
    frames: dict[str, int]  # name -> frames, above 1, of which the first is used
    blank: list[str]  # black or transparent all over
    folder_repeats: dict[str, int]  # name -> repeats by kohya's name of its folder, above 1
    duplicates: list[tuple[str, str]]  # (copy, original)
    without_trigger: list[str]
    too_long: dict[str, int]  # name -> tokens, of captions that are read only in part
    syntax: list[str]  # a line for each kind of syntax of other programs in captions
    foreign: dict[str, str]  # name -> the language of its caption, by its script
    repeated: list[list[str]]  # names with one and the same caption
    common_words: dict[str, CommonWords]  # by trigger


@dataclass(frozen=True)
class _Image:
    """What is kept of an image, so that one is in memory at a time."""

    size: Size
    thumbnail: Thumbnail
    frames: int
    blank: bool


def inspect_dataset(
    roots: Sequence[Path],
    triggers: Triggers,
    buckets: Sequence[Size],
    masks: Masks | None = None,
    training_text: Callable[[str, str], str] = lambda name, text: text,
    count_tokens: Callable[[str], int] | None = None,
    window: int = WINDOWS[77],
    follow_links: bool = False,
    class_noun: str = "",
) -> Findings:
    """Open every image and read every caption in the folders of `roots`.

    `training_text` is the text that training makes of the name and a caption of an image, `count_tokens` the tokenizer
    of the base, start and end markers included, of which `window` are read. Raises InputError for a folder without
    images, for an image in no folder of a trigger, and for a trigger without images; all other faults are findings."""
    folders = {folder_prefix(root, roots): root for root in roots}
    contents = {prefix: find_contents(root, follow_links=follow_links) for prefix, root in folders.items()}
    paths = _prefixed({prefix: found.images for prefix, found in contents.items()})
    by_trigger = triggers.names_by_trigger(paths)
    captions, caption_files = _read_captions(folders, follow_links)
    images, unreadable = _open_all(paths)
    sizes = {name: image.size for name, image in images.items()}
    nearest = {name: nearest_bucket(size, buckets) for name, size in sizes.items()}
    scales = {name: enlargement(size, nearest[name]) for name, size in sizes.items()}
    shares = {name: cut_away(size, nearest[name]) for name, size in sizes.items()}
    repeats = {
        prefix: {name: folder_repeats(name, folders[prefix]) for name in contents[prefix].images} for prefix in folders
    }
    texts = {name: [training_text(name, text) for text in image_captions] for name, image_captions in captions.items()}
    return Findings(
        pictures=len(paths),
        captions=sum(map(len, captions.values())),
        buckets={f"{width}x{height}": n for (width, height), n in Counter(nearest.values()).most_common()},
        unreadable=unreadable,
        unmasked=_unmasked(masks, paths, sizes) if masks else {},
        uncaptioned=[] if caption_files else [name for name in paths if name not in captions],
        pictureless=[name for name in captions if name not in paths],
        caption_files=caption_files,
        same_name=[prefix + name for prefix, found in contents.items() for name in found.same_name],
        same_but_case=same_but_case(paths),
        unused=_prefixed({prefix: unused_files(root, follow_links) for prefix, root in folders.items()}),
        enlarged={name: round(scale, 2) for name, scale in scales.items() if scale > 1},
        cut_away={name: round(share, 2) for name, share in shares.items() if share > MOST_CUT_AWAY},
        frames={name: image.frames for name, image in images.items() if image.frames > 1},
        blank=[name for name, image in images.items() if image.blank],
        folder_repeats={name: times for name, times in _prefixed(repeats).items() if times > 1},
        duplicates=find_duplicates({name: image.thumbnail for name, image in images.items()}),
        without_trigger=[name for name in texts if without_trigger({name: texts[name]}, triggers.of(name))],
        too_long=long_texts(texts, count_tokens, window) if count_tokens else {},
        syntax=syntax_warnings(texts),
        foreign={
            name: language
            for trigger, names in by_trigger.items()
            for name, language in foreign_texts({n: captions[n] for n in names if n in captions}, trigger).items()
        },
        repeated=repeated_captions(captions, triggers.all),
        common_words={
            trigger: CommonWords.of([text for name in names for text in captions.get(name, ())], trigger, class_noun)
            for trigger, names in by_trigger.items()
        },
    )


def _open_all(paths: Mapping[str, Path]) -> tuple[dict[str, _Image], dict[str, str]]:
    """The images by name, and why the others cannot be opened."""
    images, unreadable = {}, {}
    for name, path in paths.items():
        try:
            image, alpha = open_with_alpha(path)
            images[name] = _Image(image.size, thumbnail(image), count_frames(path), is_blank(image, alpha))
        except InputError as error:
            unreadable[name] = str(error)
    return images, unreadable


def _unmasked(masks: Masks, paths: Mapping[str, Path], sizes: Mapping[str, Size]) -> dict[str, str]:
    """Name -> why training would refuse the image's mask."""
    faults = {}
    for name, size in sizes.items():
        try:
            masks.open(name, paths[name], size)
        except InputError as error:
            faults[name] = str(error)
    return faults


def _read_captions(folders: Mapping[str, Path], follow_links: bool) -> tuple[dict[str, Texts], str]:
    """Captions by name, and why those of some folders cannot be read, "" if all can."""
    captions, reasons = {}, []
    for prefix, root in folders.items():
        try:
            captions[prefix] = read_caption_lists(root, follow_links)
        except InputError as error:
            reasons.append(str(error))
    return _prefixed(captions), "; ".join(reasons)


def _prefixed(folders: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """The entries of every folder, their names behind the folder's prefix."""
    return {prefix + name: value for prefix, entries in folders.items() for name, value in entries.items()}
