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
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_lab.captions.forms import (
    jsonl_objects,
    name_field,
    table_rows,
    text_field,
    text_files,
)
from lora_lab.captions.names import ImageNames
from lora_lab.captions.sources import (
    FORMS,
    HISTORY,
    NOT_CAPTIONS,
    PROPOSED,
    TABLE_FORMS,
    Source,
    Texts,
    checked,
    find_sources,
    refuse_overlooked,
    require_equal,
    source_files,
)
from lora_lab.console import say_once
from lora_lab.errors import InputError
from lora_lab.images.scan import leads_out, natural_key, pictures
from lora_lab.runs import write_atomically

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
