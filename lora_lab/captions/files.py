"""The captions of a folder: metadata.jsonl, .csv or .json, kohya's .txt or .caption beside each image, and what is like
them under another name.

In memory, captions are one dict, name -> text, in natural order. A name is the image's path relative to the dataset
folder, with "/" and in Unicode NFC; a text is one line. An image without a caption is not in the dict.
In .jsonl and .json an image may have a list of texts, which only read_caption_lists() accepts.
"""

import csv
import io
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from lora_lab.captions.forms import (
    TABLES,
    TAGS,
    TEXT_FIELDS,
    Row,
    jsonl_objects,
    name_field,
    table_rows,
    text_field,
    text_files,
    text_rows,
)
from lora_lab.console import cut, say_once
from lora_lab.errors import InputError
from lora_lab.images.scan import SYSTEM_FOLDERS, leads_out, natural_key, pictures
from lora_lab.runs import write_atomically


@dataclass(frozen=True)
class ImageNames:
    """The images of a folder, found by the names that people and other programs write for them."""

    paths: Mapping[str, Path]  # by name: relative to the folder, with "/", in NFC

    def find(self, value: object, where: str, folder: str = "") -> str:
        """The name of the image that `value` names in a caption file, which lies in `folder`, relative to the images'.

        It may be relative to either folder, without its suffix, or a path of another computer. A name without an image
        is returned as it is. Raises InputError, beginning with `where`, for what is no name, leads out of the folder,
        or fits several images."""
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f'{where}: the file name is {cut(value)}: write the picture\'s name, such as "image_1.png"'
            )
        path = PurePosixPath(unicodedata.normalize("NFC", value.strip()).replace("\\", "/"))
        require_utf8(str(path), where)
        if path.is_absolute() or path.parts[:1] == () or path.parts[0].endswith(":"):
            return self._of_another_computer(path, value, where)
        if ".." in path.parts:
            raise InputError(f"{where}: {cut(value)} is not inside the dataset folder: write the path relative to it")
        candidates = [str(PurePosixPath(folder, path)), str(path)]  # PurePosixPath has dropped "./"
        for name in candidates:
            if name in self.paths:
                return name
        for name in candidates:
            if found := self._without_suffix.get(name):
                return _only(found, value, where)
        return candidates[0]

    @cached_property
    def _without_suffix(self) -> dict[str, list[str]]:
        return _grouped((str(PurePosixPath(name).with_suffix("")), name) for name in self.paths)

    @cached_property
    def _by_file_name(self) -> dict[str, list[str]]:
        """Names of images by their last part, with and without its suffix."""
        files = [(PurePosixPath(name), name) for name in self.paths]
        return _grouped(pair for path, name in files for pair in ((path.name, name), (path.stem, name)))

    def _of_another_computer(self, path: PurePosixPath, value: str, where: str) -> str:
        """The image that has most of the path's last parts."""
        names = self._by_file_name.get(path.name, [])
        if not names:
            raise InputError(f"{where}: {cut(value)} is not inside the dataset folder: write the path relative to it")
        folders = path.parts[-2::-1]
        shared = {name: _shared(folders, PurePosixPath(name).parts[-2::-1]) for name in names}
        found = [name for name in names if shared[name] == max(shared.values())]
        say_once("pictures that captions name by paths of another computer are found by their file names")
        return _only(found, value, where)


def require_utf8(name: str, where: str) -> None:
    """Raise InputError, beginning with `where`, for a file name that is not UTF-8: no caption file can have it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: the file name {cut(name)} is not UTF-8: rename the picture") from None


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key, name in pairs:
        if name not in groups[key]:
            groups[key].append(name)
    return dict(groups)


def _shared(parts: tuple[str, ...], others: tuple[str, ...]) -> int:
    """The number of first parts that are equal."""
    count = 0
    while count < min(len(parts), len(others)) and parts[count] == others[count]:
        count += 1
    return count


def _only(names: list[str], value: str, where: str) -> str:
    if len(names) > 1:
        raise InputError(f"{where}: {cut(value)} may be {names[0]} or {names[1]}: write the whole name")
    return names[0]


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


WRITTEN = {".bak", *(f".{form}" for form in FORMS)}  # suffixes


def read_captions(root: Path, follow_links: bool = False) -> dict[str, str]:
    """Image name -> caption of a dataset folder, in any form; {} without caption files.

    Raises InputError as `read_caption_lists`, and for an image with several captions."""
    return _singles(read_caption_lists(root, follow_links), root)


def read_caption_lists(root: Path, follow_links: bool = False) -> dict[str, Texts]:
    """Image name -> captions of a dataset folder; {} without caption files.

    Files of other names are read where there is no metadata file and no text beside an image. Raises InputError for a
    malformed file, two forms with different captions, a file that has a missing caption but is not read as one, and,
    without `follow_links`, a caption file that is a link out of the folder."""
    root = Path(root)
    images = ImageNames(pictures(root, follow_links))
    sources = find_sources(root, images, follow_links)
    if not sources:
        captions: dict[str, Texts] = {}
    else:
        first, *others = sources
        captions = first.captions
        for other in others:
            require_equal(first, other, root)
        if first.form is None:
            say_once(f"captions are read from {', '.join(map(str, first.files[:3]))}")
    refuse_overlooked(root, images, captions, {file for source in sources for file in source.files})
    return captions


def read_caption_file(path: Path, root: Path | None = None) -> dict[str, str]:
    """Image name -> caption of one .jsonl, .csv or .json file, or of a folder of images with a text file beside each.

    `root` is the folder of the images, whose names the file has; that of the file if None. Raises InputError for a
    missing or malformed file, and for an image with several captions."""
    path = Path(path)
    if path.is_dir():
        captions = read_caption_lists(path)
        if not captions:
            raise InputError(f"no .txt file with a caption beside a picture in {path}: name the caption file itself")
    elif not path.is_file():
        raise InputError(f"no caption file {path}: check the path")
    else:
        images = ImageNames(pictures(Path(root or path.parent)))
        captions = checked(((where, images.find(name, where), text) for where, name, text in table_rows(path)), path)
    return _singles(captions, path)


def caption_files(root: Path, others: Iterable[Path] = (), follow_links: bool = False) -> set[Path]:
    """The caption files in a dataset folder, and those of `others`, its files that are no images, that are kept beside
    captions: hints, the journal, proposals, backups. Raises InputError as `scan` does."""
    kept = {Path(root, name) for name in NOT_CAPTIONS}
    read = source_files(root, ImageNames(pictures(root, follow_links)), follow_links)
    return {path for path in others if path.suffix == ".bak" or path in kept}.union(read)


def write_captions(
    root: Path, captions: Mapping[str, str], form: str | None = None, own: Mapping[Path, bytes] | None = None
) -> list[Path]:
    """Write the captions into a dataset folder, in natural order; returns the paths of the files.

    `form` is one of FORMS; None is the form that the folder has, or jsonl. Afterwards read_captions() returns these
    captions, and nothing is lost: a file is first copied to a backup (metadata.1.jsonl.bak) unless lines are only added
    or it is one of `own`, with what this program has written there; a file of another form with other captions is
    renamed to one. metadata.jsonl keeps its fields other than name and text.
    Raises InputError for a wrong name or text, an unknown form, links, and text files that two images would share."""
    root = Path(root)
    rows = ((f"caption of {name}", ImageNames({}).find(name, "captions"), text) for name, text in captions.items())
    captions = _singles(checked(rows, root), root)
    images = ImageNames(pictures(root))
    sources = find_sources(root, images, follow_links=True)
    form = form or next((source.form or "jsonl" for source in sources), "jsonl")
    if form not in FORMS:
        raise InputError(f"unknown form of captions {form!r}: choose one of {', '.join(FORMS)}")
    contents = _contents(root, captions, form, [source for source in sources if source.form in (form, None)], images)
    refuse_links(root, contents)
    for path, content in contents.items():
        old = path.read_bytes() if path.is_file() else None
        if old is not None and old != (own or {}).get(path) and not _only_adds(old, content):
            with _free_backup(path).open("xb") as backup:
                backup.write(old)
        if old != content:
            write_atomically(path, lambda file, content=content: file.write_bytes(content))
    unchanged = {name: (text,) for name, text in captions.items()}
    for source in sources:
        # Of this form: text files of images that no longer have a caption.
        if source.form == form or source.captions != unchanged:
            for path in set(source.files) - set(contents):
                path.replace(_free_backup(path))
    return list(contents)


def _only_adds(old: bytes, new: bytes) -> bool:
    """Whether the new content has every line of the old one; the last line of JSON gets a comma."""
    lines = {line.removesuffix(b",") for line in new.splitlines()}
    return all(line.removesuffix(b",") in lines for line in old.splitlines())


def refuse_links(root: Path, paths: Iterable[Path] | None = None) -> None:
    """Raise InputError if one of `paths`, all that may be written in the folder if None, is a link, behind one, or no
    file.

    A dataset may come from a stranger, whose links lead to files of this computer."""
    if paths is None:
        files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
        names = (HISTORY, PROPOSED, *(f"metadata.{form}" for form in TABLE_FORMS))
        paths = [*(path for path in files if path.suffix.lower() in WRITTEN), *(Path(root, name) for name in names)]
    for path in paths:
        if path.is_symlink() or leads_out(path.parent, root):
            link = path if path.is_symlink() else path.parent
            raise InputError(f"{link} is a link to {os.path.realpath(link)}: nothing is written through it, remove it")
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is a folder, FIFO or device, where captions are written: rename or remove it")


def _singles(captions: dict[str, Texts], source: Path) -> dict[str, str]:
    for name, texts in captions.items():
        if len(texts) > 1:
            raise InputError(
                f"{name} in {source} has {len(texts)} captions, which only stage=train and stage=check accept: keep one"
            )
    return {name: texts[0] for name, texts in captions.items()}


def _free_backup(path: Path) -> Path:
    """metadata.jsonl -> metadata.1.jsonl.bak, or the first unused number."""
    number = 1
    while os.path.lexists(backup := path.with_name(f"{path.stem}.{number}{path.suffix}.bak")):
        number += 1
    return backup


# ---- writing


def _contents(
    root: Path, captions: dict[str, str], form: str, sources: list[Source], images: ImageNames
) -> dict[Path, bytes]:
    """File -> its new content; `sources` are the present ones of this form, or of files under other names."""
    files = [path for source in sources for path in source.files]
    names = (path for path in files if path.parent == root and path.name.lower() == f"metadata.{form}")
    path = next(names, root / f"metadata.{form}")
    if form == "jsonl":
        return {path: _jsonl(captions, _other_fields(files, root, images)).encode()}
    if form == "csv":
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator="\n").writerows([("file_name", "text"), *captions.items()])
        return {path: file.getvalue().encode("utf-8-sig")}  # without the byte order mark Excel decodes it as cp949
    if form == "json":
        return {path: (json.dumps(captions, ensure_ascii=False, indent=2) + "\n").encode()}
    beside = text_files(images.paths, f".{form}")
    contents: dict[Path, bytes] = {}
    for name, text in captions.items():
        paths = beside.get(name) or [images.paths.get(name, root / name).with_suffix(f".{form}")]
        for file in paths:
            if contents.setdefault(file, content := f"{text}\n".encode()) != content:
                raise InputError(f"{name} and another picture would share {file.name}: rename one of the pictures")
    return contents


def _jsonl(captions: dict[str, str], other_fields: dict[str, dict]) -> str:
    names = sorted({**captions, **other_fields}, key=natural_key)
    rows = ({"file_name": name, "text": captions.get(name, ""), **other_fields.get(name, {})} for name in names)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _other_fields(files: Iterable[Path], root: Path, images: ImageNames) -> dict[str, dict]:
    """Image name -> the user's own fields in JSONL files, for the rows that have any."""
    other_fields = {}
    for file in (path for path in files if path.suffix.lower() == ".jsonl"):
        for where, row in jsonl_objects(file):
            name, text = name_field(row, where), text_field(row, where)
            others = {key: value for key, value in row.items() if key not in (name, text, "file_name", "text")}
            if others:
                other_fields[images.find(row[name], where, file.parent.relative_to(root).as_posix())] = others
    return other_fields
