"""Which files of a dataset folder are images, and their names."""

import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from lora_lab.errors import InputError

READ = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
NOT_READ = frozenset(
    {".heic", ".heif", ".avif", ".jxl", ".gif"}
)  # images too, but Pillow alone does not read them reliably


def natural_key(name: str) -> tuple:
    """Sort key of the natural order: image_2.png before image_10.png, ignoring case."""
    parts = re.split(r"(\d+)", unicodedata.normalize("NFC", name))
    return tuple(int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)), name


def pictures(root: Path) -> dict[str, Path]:
    """Name (relative, POSIX, NFC) -> path of every image under `root` that is not hidden, in natural order.

    It may be empty. Of two files whose names are equal in NFC one is kept (`same_names` finds them)."""
    return {name: path for name, path in _files(root) if path.suffix.lower() in READ} if root.is_dir() else {}


def find_pictures(root: Path, key: str = "dataset.root") -> dict[str, Path]:
    """Name -> path of every image under `root`, in natural order.

    Raises InputError, naming the configuration's `key` for `root`, if there is none."""
    paths = pictures(root)
    if not paths:
        others = unsupported(root)
        hint = f" ({others[0]} and its like are not read: convert them to PNG)" if others else ""
        raise InputError(f"no pictures in {root}: point {key} at a folder of .png, .jpg or .webp files{hint}")
    return paths


def leads_out(path: Path, root: Path) -> bool:
    """Whether `path`, with all links in it followed, lies outside the folder `root`; for a link to nothing, its target.

    A dataset may come from a stranger: what a link in it names elsewhere is neither read nor written to."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def unsupported(root: Path) -> list[str]:
    """Names of the images under `root` in a format that is not read (HEIC, AVIF, JPEG XL, GIF), in natural order.

    Raises InputError if `root` is not a folder."""
    return [name for name, path in _files(root) if path.suffix.lower() in NOT_READ]


def same_names(root: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """Names that are too similar: (those on disk both as NFC and as NFD, those that differ only by case).

    The former are one name to this program; the latter are one file on Windows and macOS, so one is lost there.
    Raises InputError if `root` is not a folder."""
    by_name: dict[str, int] = defaultdict(int)
    by_case: dict[str, list[str]] = defaultdict(list)
    for name, path in _files(root):
        if path.suffix.lower() in READ:
            by_name[name] += 1
            by_case[name.casefold()].append(name)
    twice = [name for name, count in by_name.items() if count > 1]
    return twice, [tuple(dict.fromkeys(names)) for names in by_case.values() if len(set(names)) > 1]


def _files(root: Path) -> list[tuple[str, Path]]:
    """(name, path) of every file under `root` that is not hidden, in natural order."""
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {state}: point dataset.root at a folder of .png, .jpg or .webp files")
    named_paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            if not file.startswith("."):
                path = Path(folder, file)
                # macOS unpacks names as NFD; metadata written elsewhere has them as NFC
                named_paths.append((unicodedata.normalize("NFC", path.relative_to(root).as_posix()), path))
    return sorted(named_paths, key=lambda item: (natural_key(item[0]), str(item[1])))
