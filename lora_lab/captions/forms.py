"""The rows of caption files: JSON lines, CSV, JSON, and one text file beside each image.

A row is a name and a text as they stand in the file; files.py checks them and finds the image that a name means."""

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lora_lab.captions.encoding import decode_files
from lora_lab.console import cut
from lora_lab.errors import InputError

NAME_FIELDS = ("file_name", "image", "file", "filename", "path", "image_path")
TEXT_FIELDS = ("text", "caption", "prompt")
TAGS = "tags"  # beside or instead of the caption in the files of kohya's scripts
DELIMITERS = (",", ";", "\t")  # of CSV: semicolons are Excel's where a comma is the decimal point

Row = tuple[str, object, object]  # position in the file (for messages), name, text; not yet checked


def table_rows(path: Path) -> Iterator[Row]:
    """The rows of a file with the captions of many images. Raises InputError for a malformed one."""
    rows = TABLES.get(path.suffix.lower())
    if rows is None:
        raise InputError(f"{path} is not a caption file: name a .jsonl, .csv or .json file, or a folder of .txt files")
    return rows(path)


def text_files(images: Mapping[str, Path], suffix: str) -> dict[str, list[Path]]:
    """Image name -> the files beside it with its name and `suffix` (".txt"), in any case; images without one are not
    in it."""
    folders = {path.parent for path in images.values()}
    found: dict[tuple[Path, str], list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() == suffix:
                found.setdefault((folder, _composed(path.stem)), []).append(path)
    beside = {name: found.get((path.parent, _composed(path.stem)), []) for name, path in images.items()}
    return {name: [path for path in paths if path.is_file()] for name, paths in beside.items() if paths}


def text_rows(files: Mapping[str, Sequence[Path]], root: Path) -> Iterator[Row]:
    """The rows of `text_files` in the folder `root`."""
    named_paths = [(name, path) for name, paths in files.items() for path in paths]
    contents = [path.read_bytes() for _, path in named_paths]
    source = named_paths[0][1] if len(named_paths) == 1 else root
    for (name, path), text in zip(named_paths, decode_files(contents, source), strict=True):
        yield str(path), name, text


def jsonl_objects(path: Path) -> Iterator[tuple[str, dict]]:
    """(position, row) of JSON lines. Raises InputError, naming the line, for anything but an object."""
    # not splitlines(): it would also cut at U+2028, which JSON allows inside a text
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            row = _json(line, where)
            if not isinstance(row, dict):
                raise InputError(f'{where}: not a row like {{"file_name": "image_1.png", "text": "..."}}')
            yield where, row


def name_field(row: Iterable[str], where: str) -> str:
    """The field of the row, one of NAME_FIELDS, that names the image. Raises InputError if there is none."""
    return _field(row, NAME_FIELDS, where)


def text_field(row: Iterable[str], where: str) -> str:
    """The field of the row, one of TEXT_FIELDS, that has the caption. Raises InputError if there is none."""
    return _field(row, TEXT_FIELDS, where)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for where, row in jsonl_objects(path):
        yield where, row[name_field(row, where)], row[text_field(row, where)]


def _csv_rows(path: Path) -> Iterator[Row]:
    text = _decoded(path)
    if text[:4].lower() == "sep=":  # Excel's own line, before the header
        text = text.partition("\n")[2]
    delimiter = _delimiter(text)
    csv.field_size_limit(max(len(text), 2**17))
    # strict: a missing quote must not swallow the rest
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                name, text = name_field(header, where), text_field(header, where)
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{where}: {len(cells)} cells where the header has {len(header)}: "
                    f"put a text that has {'commas' if delimiter == ',' else repr(delimiter)} in double quotes"
                )
            row = dict(zip(header, cells, strict=True))
            yield where, row[name], row[text]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}: check the double quotes") from None


def _delimiter(text: str) -> str:
    """The delimiter with which the first line has both a name and a text."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    for delimiter in DELIMITERS:
        header = [cell.strip(' "').casefold() for cell in line.split(delimiter)]
        if any(field in header for field in NAME_FIELDS) and any(field in header for field in TEXT_FIELDS):
            return delimiter
    return max(DELIMITERS, key=line.count)


def _json_rows(path: Path) -> Iterator[Row]:
    # pairs, not a dict: of a name that is there twice Python would keep the last without a word
    content = _json(_decoded(path), str(path), object_pairs_hook=_Pairs)
    if isinstance(content, _Pairs):
        for name, value in content:
            where = f"{path}, {name[:200]}"
            yield where, name, _kohya_text(dict(value), where) if isinstance(value, _Pairs) else value
    elif isinstance(content, list) and all(isinstance(row, _Pairs) for row in content):
        for number, pairs in enumerate(content, start=1):
            row, where = dict(pairs), f"{path}, object {number}"
            yield where, row[name_field(row, where)], row[text_field(row, where)]
    else:
        raise InputError(
            f'{path}: not a mapping like {{"image_1.png": "a caption"}}, nor a list like '
            f'[{{"file_name": "image_1.png", "text": "a caption"}}]: write one of them'
        )


def _kohya_text(row: dict[str, object], where: str) -> object:
    """The caption of one image in kohya's meta_cap.json, its tags behind it, as kohya's scripts join them."""
    tags = row.get(TAGS)
    if not isinstance(tags, str) or not tags.strip():
        return row[text_field(row, where)]
    text = next((row[field] for field in TEXT_FIELDS if isinstance(row.get(field), str) and row[field].strip()), None)
    return tags if text is None else f"{text}, {tags}"


class _Pairs(list):
    """The (key, value) pairs of a JSON object, in the file's order."""


TABLES: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".json": _json_rows,
}


def _decoded(path: Path) -> str:
    return decode_files([path.read_bytes()], path)[0]


def _json(text: str, where: str, **options):
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if ", line " not in where else ""
        raise InputError(f"{where}{line}: not JSON ({error.msg}, column {error.colno}): correct that line") from None
    except (RecursionError, ValueError):  # a million brackets, a number of a million digits
        raise InputError(f"{where}: not captions, but brackets or numbers without end: correct the file") from None


def _field(row: Iterable[str], fields: tuple[str, ...], where: str) -> str:
    keys = {key.casefold(): key for key in reversed(list(row))}
    name = next((keys[field] for field in fields if field in keys), None)
    if name is None:
        found = ", ".join(map(cut, list(row)[:8]))
        raise InputError(f"{where}: no field {fields[0]!r} among {found}: name it {fields[0]!r}")
    return name


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)
