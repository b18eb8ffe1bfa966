"""The places in a dataset folder that have captions: which files, under which names, and what they say."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_lab.captions.forms import TABLES, TAGS, TEXT_FIELDS, Row, table_rows, text_files, text_rows
from lora_lab.captions.names import ImageNames
from lora_lab.console import cut
from lora_lab.errors import InputError
from lora_lab.images.scan import SYSTEM_FOLDERS, leads_out, natural_key

TABLE_FORMS, TEXT_FORMS = ("jsonl", "csv", "json"), ("txt", "caption")
FORMS = (*TABLE_FORMS, *TEXT_FORMS)
HISTORY, PROPOSED = "captions.history.jsonl", "metadata.proposed.jsonl"  # the program's own, which have no captions
NOT_CAPTIONS = (HISTORY, PROPOSED, "hints.jsonl", "hints.csv")

Texts = tuple[str, ...]  # the captions of one image
Place = tuple[str | None, str, list[Path], Iterable[Row]]  # form, title, files, rows


@dataclass(frozen=True)
class Source:
    """One place of captions in a folder."""

    form: str | None  # one of FORMS where write_captions() writes it; None for a file of another name
    title: str  # for messages
    files: list[Path]
    captions: dict[str, Texts]


def find_sources(root: Path, images: ImageNames, follow_links: bool) -> list[Source]:
    """What the folder has of FORMS; without any of these, what it has under other names. Both only with captions."""
    for places in (_places(root, images), _other_places(root, images)):
        sources = []
        for form, title, files, rows in places:
            if not follow_links:
                refuse_outward(files, root)
            if captions := checked(rows, root):
                sources.append(Source(form, title, files, captions))
        if sources:
            return sources
    return []


def source_files(root: Path, images: ImageNames, follow_links: bool) -> list[Path]:
    """The files of `find_sources`; of a folder with a malformed one those that it would be read with."""
    try:
        return [file for source in find_sources(root, images, follow_links) for file in source.files]
    except InputError:
        places = [*_places(root, images), *_other_places(root, images)]
        return [file for _, _, files, _ in places for file in files]


def _places(root: Path, images: ImageNames) -> Iterator[Place]:
    for form in TABLE_FORMS:
        files = [path for path in _tables(root) if path.name.lower() == f"metadata.{form}"]
        yield form, f"metadata.{form}", files, _table_rows(files, root, images)
    for form in TEXT_FORMS:
        beside = text_files(images.paths, f".{form}")
        files = [path for paths in beside.values() for path in paths]
        yield form, f"the .{form} files", files, text_rows(beside, root)


def _other_places(root: Path, images: ImageNames) -> Iterator[Place]:
    for path in _tables(root):
        name = path.name.lower()
        if name in ("meta_cap.json", "meta_lat.json") or (name.startswith("metadata") and name.endswith(".jsonl")):
            yield None, path.name, [path], _table_rows([path], root, images)
    inside = [path for folder in _folders(root) for path in _tables(folder) if path.stem.lower() == "metadata"]
    yield None, "the metadata files one folder down", inside, _table_rows(inside, root, images)


def _tables(folder: Path) -> list[Path]:
    """The files in the folder itself that may have the captions of many images."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if path.suffix.lower() in TABLES and path.name not in NOT_CAPTIONS]
    return sorted(path for path in files if path.is_file() and not path.name.startswith("."))


def _folders(root: Path) -> list[Path]:
    folders = sorted(root.iterdir()) if root.is_dir() else []
    folders = [path for path in folders if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")]
    return [path for path in folders if path.name.lower() not in SYSTEM_FOLDERS]


def _table_rows(files: Iterable[Path], root: Path, images: ImageNames) -> Iterator[Row]:
    """The rows of the files, with the names of the images that they mean."""
    for file in files:
        folder = file.parent.relative_to(root).as_posix()
        for where, name, text in table_rows(file):
            yield where, images.find(name, where, folder), text


def refuse_outward(files: Iterable[Path], root: Path) -> None:
    """Raise InputError if one of the files is a link out of the folder `root`."""
    for file in files:
        if leads_out(file, root):
            raise InputError(
                f"{file} is a link to {os.path.realpath(file)}, outside the dataset folder, and is not read: put a "
                f"copy there, or set dataset.follow_links=true for a folder that you trust"
            )


def require_equal(first: Source, other: Source, root: Path) -> None:
    """Raise InputError, naming the first image, if the captions of two places differ."""
    if other.captions != first.captions:
        name = min((first.captions.items() ^ other.captions.items()), key=lambda row: natural_key(row[0]))[0]
        raise InputError(
            f"{first.title} and {other.title} in {root} differ (first at {name}): "
            f"keep one of them, or make them one with stage=convert"
        )


def refuse_overlooked(root: Path, images: ImageNames, captions: Mapping[str, Texts], read: set[Path]) -> None:
    """Raise InputError for a file that has the caption of an image without one, and is not read: a captioner must not
    write where a person has written already."""
    uncaptioned = {name: path for name, path in images.paths.items() if name not in captions}
    if not uncaptioned:
        return
    folders = dict.fromkeys([root, *_folders(root), *(path.parent for path in images.paths.values())])
    for file in (path for folder in folders for path in _tables(folder) if path not in read):
        if leads_out(file, root):
            continue
        try:
            found = checked(_table_rows([file], root, images), root)
        except InputError:
            continue  # not captions, whatever it is
        if name := next((name for name in uncaptioned if name in found), None):
            raise _overlooked(file, name, root)
    keys = [f'"{key}"'.encode() for key in (*TEXT_FIELDS, TAGS)]
    for name, path in uncaptioned.items():
        beside = [path.with_suffix(".json"), *(path.with_name(path.name + s) for s in (".txt", ".caption", ".json"))]
        for file in (file for file in beside if file.is_file() and not leads_out(file, root)):
            if file.suffix != ".json" or any(key in file.read_bytes() for key in keys):
                raise _overlooked(file, name, root)


def _overlooked(file: Path, name: str, root: Path) -> InputError:
    form = file.suffix.lower() if file.suffix.lower() in TABLES else ".jsonl"
    return InputError(
        f"{file} has a caption for {name}, but is not read as a caption file: make it {root / f'metadata{form}'} or "
        f"{Path(name).with_suffix('.txt').name} beside the picture, or move it out of the folder"
    )


def checked(rows: Iterable[Row], source: Path) -> dict[str, Texts]:
    """Image name -> captions of these rows, whose names are those of images: texts normalised, empty ones dropped.

    Raises InputError for a wrong text, and for two different texts of one image."""
    captions: dict[str, Texts] = {}
    for where, name, value in rows:
        texts = tuple(filter(None, (_text(text, where) for text in (value if isinstance(value, list) else [value]))))
        if texts and captions.setdefault(name, texts) != texts:
            raise InputError(f"{where}: {name} occurs twice with different texts in {source}: keep one")
    return {name: captions[name] for name in sorted(captions, key=natural_key)}


def _text(value: object, where: str) -> str:
    """The text on one line; "" (no caption yet) for null or blanks."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: the caption is {cut(value)}: write a text in quotes")
    if "\0" in value:
        raise InputError(f"{where}: the caption {cut(value)} has NUL letters: save it again with the encoding UTF-8")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # half an emoji: JSON can encode it, UTF-8 cannot
        raise InputError(f"{where}: the caption has a broken character (half an emoji?): type it again")
    return " ".join(filter(None, map(str.strip, value.splitlines())))
