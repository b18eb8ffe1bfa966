"""A dataset folder as training takes it: every picture with its caption, or one sentence that says what is wrong."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from lora_lab.captions.files import read_caption_lists
from lora_lab.errors import InputError
from lora_lab.images.scan import find_pictures, same_names


@dataclass(frozen=True)
class Sample:
    name: str  # relative to the dataset folder, POSIX, NFC; of several folders the folder's name stands before it
    path: Path
    captions: tuple[str, ...]  # at least one
    repeats: int = 1  # times that an epoch shows it


def read_folders(folders: Sequence[tuple[Path, int]]) -> list[Sample]:
    """Every picture of (folder, repeats)s, folder by folder.

    Raises InputError for a folder that `read_dataset` refuses, for two of one name, and for a picture in two."""
    if len(folders) == 1:
        (root, repeats), *_ = folders
        return [replace(sample, repeats=repeats) for sample in read_dataset(root)]
    samples: list[Sample] = []
    for root, repeats in folders:
        name = root.resolve().name
        samples += [replace(s, name=f"{name}/{s.name}", repeats=repeats) for s in read_dataset(root)]
    seen: dict[Path, str] = {}
    for sample in samples:
        other = seen.setdefault(sample.path.resolve(), sample.name)
        if other is not sample.name:
            raise InputError(f"{other} is also {sample.name}: name every folder once, and none inside another")
    names = [root.resolve().name for root, _ in folders]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"two folders of dataset.root are called {name}: rename one, pictures are told apart by it"
            )
    return samples


def read_dataset(root: Path) -> list[Sample]:
    """Every picture under `root` with its captions, in natural order.

    Raises InputError unless pictures and captions match one to one."""
    pictures, captions = _pictures(root), read_caption_lists(root)
    if not captions:
        raise InputError(f"no captions in {root}: run stage=caption first")
    uncaptioned = [name for name in pictures if name not in captions]
    for name in captions:
        if name not in pictures:
            raise InputError(missing_picture(name, root, uncaptioned))
    if uncaptioned:
        raise InputError(missing_captions(uncaptioned, root))
    return [Sample(name, path, captions[name]) for name, path in pictures.items()]


def apply_caption_affixes(caption: str, prefix: str, suffix: str, trigger: str) -> str:
    """The caption between `dataset.caption_prefix` and `_suffix`, blanks between them but none before a comma."""
    text = caption
    if prefix:
        text = f"{prefix} {text}"
    if suffix:
        text = f"{text}{'' if suffix.startswith(',') else ' '}{suffix}"
    return text.replace("{trigger}", trigger) if prefix or suffix else text


def copy_pictures(root: Path, to: Path) -> int:
    """Copy the pictures under `root`, without their captions, into the new folder `to`; returns how many."""
    pictures = _pictures(root)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to} is there already: name a new folder")
    for name, path in pictures.items():
        copy = to / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return len(pictures)


def missing_picture(name: str, root: Path, uncaptioned: Sequence[str]) -> str:
    """The message for a caption without its picture; an uncaptioned picture of much the same name is offered."""
    similar = get_close_matches(name, uncaptioned, n=1, cutoff=0.7)
    hint = f"was {similar[0]} meant" if similar else "put it back or delete the caption"
    return f"there is a caption for {name}, but no such picture in {root}: {hint}" + ("?" if similar else "")


def missing_captions(names: Sequence[str], root: Path) -> str:
    """The message for pictures without a caption."""
    few = list_names(names)
    return f"{len(names)} of the pictures in {root} have no caption ({few}): run stage=caption, or take them out"


def same_name_twice(names: Sequence[str], root: Path) -> str:
    """The message for two files whose names Unicode holds equal."""
    return (
        f"{list_names(names)} is in {root} twice, its letters composed (NFC) and decomposed (NFD): rename or remove one"
    )


def list_names(names: Sequence[str], most: int = 3) -> str:
    """'a.png, b.png, c.png and 4 more'."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _pictures(root: Path) -> dict[str, Path]:
    pictures = find_pictures(root)
    twice, _ = same_names(root)
    if twice:
        raise InputError(same_name_twice(twice, root))
    return pictures
