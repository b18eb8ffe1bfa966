"""Which files of a dataset folder are images, their names, and what is left out."""

import os
import re
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lora_lab.console import printable
from lora_lab.errors import InputError

FORMATS = {
    ".png": "PNG", ".apng": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP",
    ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF", ".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF",
    ".hif": "HEIF",
}  # fmt: skip  # suffix -> Pillow's name of the format
# Images in formats that are not read: vector graphics, drawing programs, raw files of cameras, textures, scans.
NOT_READ = frozenset({
    ".svg", ".svgz", ".ai", ".eps", ".ps", ".wmf", ".emf", ".psd", ".psb", ".xcf", ".kra", ".ora", ".clip", ".sai",
    ".afphoto", ".procreate", ".raw", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".dng", ".orf",
    ".rw2", ".raf", ".pef", ".srw", ".x3f", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".jxr", ".heics", ".heifs",
    ".avifs", ".ico", ".cur", ".icns", ".tga", ".dds", ".exr", ".hdr", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm", ".pam",
    ".qoi", ".sgi", ".dib", ".btf", ".tf8", ".djvu",
})  # fmt: skip
SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", ".directory", "icon\r"})
# Of Synology, Samba, Windows, ext4 and macOS: they have thumbnails and deleted images.
SYSTEM_FOLDERS = frozenset({
    "@eadir", "#recycle", "#snapshot", "$recycle.bin", "recycler", "system volume information", "lost+found",
    "__macosx",
})  # fmt: skip
LEADS_OUT = "a link that leads out of the folder: copy what it links to, or set dataset.follow_links=true"


@dataclass(frozen=True)
class Contents:
    """The files of a dataset folder by name (relative, POSIX, NFC), in natural order."""

    images: dict[str, Path]
    others: dict[str, Path]  # files that may be captions
    left_out: dict[str, str]  # file or folder (it ends with a slash) -> what it is and what to do
    same_name: list[str]  # images that are there twice, as NFC and as NFD, of which one is in `images`


def natural_key(name: str) -> tuple:
    """Sort key of the natural order: image_2.png before image_10.png, ignoring case."""
    parts = re.split(r"(\d+)", unicodedata.normalize("NFC", name))
    numbers = [part.lstrip("0") for part in parts[1::2]]  # by length and digits: int() refuses thousands of digits
    parts[1::2] = [(len(digits), digits) for digits in numbers]
    return tuple(part if i % 2 else part.casefold() for i, part in enumerate(parts)), name


def readable_formats() -> dict[str, str]:
    """Suffix -> Pillow's format of the images that are read: HEIF's only where pillow-heif is installed."""
    heif = find_spec("pillow_heif") is not None
    return {suffix: name for suffix, name in FORMATS.items() if name != "HEIF" or heif}


def why_not_read(suffix: str) -> str | None:
    """What a file of this suffix, in lower case, is and what to do; None for images that are read, and no images."""
    if suffix in FORMATS and suffix not in readable_formats():
        return 'a HEIC image: pip install "lora_lab[heif]", or convert it to PNG'
    return "an image in a format that is not read: convert it to PNG" if suffix in NOT_READ else None


def pictures(root: Path, follow_links: bool = False) -> dict[str, Path]:
    """Name -> path of every image under `root`, in natural order; {} also where `root` is not a folder.

    Raises InputError as `scan` does."""
    return scan(root, follow_links).images if root.is_dir() else {}


def find_pictures(root: Path, key: str = "dataset.root", follow_links: bool = False) -> dict[str, Path]:
    """Name -> path of every image under `root`, in natural order. Raises InputError as `find_contents` does."""
    return find_contents(root, key, follow_links).images


def find_contents(root: Path, key: str = "dataset.root", follow_links: bool = False) -> Contents:
    """What is in the folder `root`, which has images.

    Raises InputError, naming the configuration's `key` for `root`, if there are none, and as `scan` does."""
    contents = scan(root, follow_links)
    if not contents.images:
        hint = next((f" ({name} is {reason})" for name, reason in contents.left_out.items()), "")
        raise InputError(f"no pictures in {root}: point {key} at a folder of .png, .jpg or .webp files{hint}")
    return contents


def scan(root: Path, follow_links: bool = False) -> Contents:
    """What is in the folder `root` and below it. `follow_links` also reads what links lead out of it to.

    Raises InputError if `root` is not a folder, and for an image whose name cannot be printed."""
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise InputError(f"{root} {state}: point dataset.root at a folder of .png, .jpg or .webp files")
    suffixes = readable_formats()
    images, others, left_out, same_name = {}, {}, {}, []
    for name, path, reason in sorted(
        _walk(root, follow_links), key=lambda found: (natural_key(found[0]), str(found[1]))
    ):
        suffix = path.suffix.lower()
        if reason:
            left_out[printable(name)] = reason
        elif suffix in suffixes:
            if printable(name) != name:
                raise InputError(f"{printable(str(path))}: the name has characters that are not text: rename the file")
            if name in images:
                same_name.append(name)
            images.setdefault(name, path)
        elif unread := why_not_read(suffix):
            left_out[printable(name)] = unread
        else:
            others[name] = path
    return Contents(images, others, left_out, list(dict.fromkeys(same_name)))


def leads_out(path: Path, root: Path) -> bool:
    """Whether `path`, with all links in it followed, lies outside the folder `root`; for a link to nothing, its target.

    A dataset may come from a stranger: what a link in it names elsewhere is neither read nor written to."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def same_but_case(names: list[str]) -> list[tuple[str, ...]]:
    """Groups of names that differ only by case: they are one file on Windows and macOS, so one is lost there."""
    by_case: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_case[name.casefold()].append(name)
    return [tuple(group) for group in by_case.values() if len(group) > 1]


def _walk(root: Path, follow_links: bool) -> Iterator[tuple[str, Path, str | None]]:
    """(name, path, reason to leave it out) of every file under `root`, and of the folders that are not entered."""
    entered, folders = {os.path.realpath(root)}, [root]
    while folders:
        folder = folders.pop()
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            yield (
                _name(folder, root) + "/",
                folder,
                f"a folder that cannot be read ({error.strerror}): let it be read",
            )
            continue
        for path in paths:
            if path.name.lower() in SYSTEM_FILES or path.name.startswith("._"):  # nobody takes them for images
                continue
            mode = _mode(path)
            reason, is_folder = _why_left_out(path, mode, root, follow_links), stat.S_ISDIR(mode)
            if is_folder and not reason:
                place = os.path.realpath(path)
                if place not in entered:
                    entered.add(place)
                    folders.append(path)
                    continue
                reason = "a link to a folder that is read already: remove it"
            yield _name(path, root) + ("/" if is_folder else ""), path, reason


def _name(path: Path, root: Path) -> str:
    # macOS unpacks names as NFD; metadata written elsewhere has them as NFC
    return unicodedata.normalize("NFC", path.relative_to(root).as_posix())


def _mode(path: Path) -> int:
    """What is at `path`, links followed, as in stat's st_mode; 0 for nothing."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _why_left_out(path: Path, mode: int, root: Path, follow_links: bool) -> str | None:
    """What the file or folder of `_mode` at `path` is and what to do, if it is not read, whatever its suffix."""
    is_folder = stat.S_ISDIR(mode)
    if path.is_symlink():
        outside = leads_out(path, root)
        if outside and not follow_links:
            return LEADS_OUT
        if not mode:
            return "a link to nothing: remove it"
        if is_folder and not outside:
            return "a link to a folder of the dataset, which is read there: remove it"
    if is_folder and path.name.lower() in SYSTEM_FOLDERS:
        return "a folder of the operating system: remove it, or rename it if its images are meant"
    if not is_folder and not stat.S_ISREG(mode):
        return "a FIFO, socket or device, which is never opened: remove it"
    if path.name.startswith("."):
        return f"a hidden {'folder' if is_folder else 'file'}: rename it if it is meant"
    return None
