"""Caption files in four forms: metadata.jsonl, metadata.csv, metadata.json and kohya's one .txt beside each image.

In memory, captions are one dict, name -> text, in natural order. A name is the image's path relative to the dataset
folder, with "/" and in Unicode NFC; a text is one line. An image without a caption is not in the dict.
In .jsonl and .json an image may have a list of texts, which only read_caption_lists() accepts.
"""

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from lora_lab.errors import InputError
from lora_lab.images.scan import natural_key, pictures
from lora_lab.runs import write_atomically

FORMS = ("jsonl", "csv", "json", "txt")
NAME_FIELDS = ("file_name", "image", "file")
TEXT_FIELDS = ("text", "caption", "prompt")

Texts = tuple[str, ...]  # the captions of one image
Row = tuple[str, object, object]  # position in the file (for messages), name, text; not yet checked


def read_captions(root: Path) -> dict[str, str]:
    """Image name -> caption of a dataset folder, in any form; {} without caption files.

    Raises InputError for a malformed file, two forms with different captions, and an image with several captions."""
    return _singles(read_caption_lists(root), root)


def read_caption_lists(root: Path) -> dict[str, Texts]:
    """Image name -> captions of a dataset folder; {} without caption files.

    Raises InputError for a malformed file and for two forms with different captions."""
    forms = _forms_in(Path(root))
    if not forms:
        return {}
    (form, captions), *others = forms.items()
    for other, other_captions in others:
        if other_captions != captions:
            name = min((captions.items() ^ other_captions.items()), key=lambda row: natural_key(row[0]))[0]
            raise InputError(
                f"{_title(form)} and {_title(other)} in {root} differ (first at {name}): "
                f"keep one of them, or make them one with stage=convert"
            )
    return captions


def read_caption_file(path: Path) -> dict[str, str]:
    """Image name -> caption of one .jsonl, .csv or .json file, or of a folder of images with a .txt beside each.

    Raises InputError for a missing or malformed file, and for an image with several captions."""
    return _singles(_read_file(Path(path)), path)


def _read_file(path: Path) -> dict[str, Texts]:
    if path.is_dir():
        captions = _checked(_txt_rows(path), path)
        if not captions:
            raise InputError(f"no .txt file with a caption beside a picture in {path}: name the caption file itself")
        return captions
    if not path.is_file():
        raise InputError(f"no caption file {path}: check the path")
    rows = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".json": _json_rows}.get(path.suffix.lower())
    if rows is None:
        raise InputError(f"{path} is not a caption file: name a .jsonl, .csv or .json file, or a folder of .txt files")
    return _checked(rows(path), path)


def write_captions(root: Path, captions: dict[str, str], form: str | None = None) -> list[Path]:
    """Write the captions into a dataset folder, in natural order; returns the paths of the files.

    `form` is one of FORMS; None is the form that the folder has, or jsonl. Afterwards read_captions() returns these
    captions, and nothing is lost: a changed file is first copied to a backup (metadata.1.jsonl.bak), and a file of
    another form with other captions is renamed to one. metadata.jsonl keeps its fields other than name and text.
    Raises InputError for a wrong name or text, an unknown form, and .txt files that two images would share."""
    root = Path(root)
    rows = ((f"caption of {name}", name, text) for name, text in captions.items())
    captions = _singles(_checked(rows, root), root)
    forms = _forms_in(root)
    form = form or next(iter(forms), "jsonl")
    if form not in FORMS:
        raise InputError(f"unknown form of captions {form!r}: choose one of {', '.join(FORMS)}")
    contents = _contents(root, captions, form)
    for path, content in contents.items():
        if path.is_file() and path.read_bytes() != content:
            _free_backup(path).write_bytes(path.read_bytes())
        write_atomically(path, lambda file, content=content: file.write_bytes(content))
    for other, other_captions in forms.items():
        if other != form and other_captions != {name: (text,) for name, text in captions.items()}:
            for path in _paths(root, other):
                path.replace(_free_backup(path))
    if form == "txt":  # .txt files of images that no longer have a caption
        for path in set(_paths(root, "txt")) - set(contents):
            path.replace(_free_backup(path))
    return list(contents)


# ---- the caption files of a folder


def is_in_use(path: Path, root: Path) -> bool:
    """Whether `path`, which is not an image, is a caption file of the folder `root` that is read, or beside one: hints,
    the journal, proposals, a backup."""
    if path.suffix == ".bak" or path.name in ("captions.history.jsonl", "metadata.proposed.jsonl"):
        return True
    return path in {root / "hints.jsonl", root / "hints.csv"} or any(path in _paths(root, form) for form in FORMS)


def _paths(root: Path, form: str) -> list[Path]:
    if form == "txt":
        beside = dict.fromkeys(path.with_suffix(".txt") for path in pictures(root).values())
        return [path for path in beside if path.is_file()]
    path = root / f"metadata.{form}"
    return [path] if path.is_file() else []


def _forms_in(root: Path) -> dict[str, dict[str, Texts]]:
    """Form -> captions, for each form with any captions."""
    forms = {
        form: _checked(_txt_rows(root), root) if form == "txt" else _read_file(root / f"metadata.{form}")
        for form in FORMS
        if _paths(root, form)
    }
    return {form: captions for form, captions in forms.items() if captions}


def _title(form: str) -> str:
    return "the .txt files" if form == "txt" else f"metadata.{form}"


def _free_backup(path: Path) -> Path:
    """metadata.jsonl -> metadata.1.jsonl.bak, or the first unused number."""
    number = 1
    while (backup := path.with_name(f"{path.stem}.{number}{path.suffix}.bak")).exists():
        number += 1
    return backup


# ---- reading


def _checked(rows: Iterable[Row], source: Path) -> dict[str, Texts]:
    """Image name -> captions of these rows: names and texts normalised, empty texts dropped.

    Raises InputError for a wrong name or text, and for two different texts of one image."""
    captions: dict[str, Texts] = {}
    for where, raw_name, raw_text in rows:
        name = _name(raw_name, where)
        texts = tuple(filter(None, (_text(t, where) for t in (raw_text if isinstance(raw_text, list) else [raw_text]))))
        if texts and captions.setdefault(name, texts) != texts:
            raise InputError(f"{where}: {name} occurs twice with different texts in {source}: keep one")
    return {name: captions[name] for name in sorted(captions, key=natural_key)}


def _singles(captions: dict[str, Texts], source: Path) -> dict[str, str]:
    for name, texts in captions.items():
        if len(texts) > 1:
            raise InputError(
                f"{name} in {source} has {len(texts)} captions, which only stage=train and stage=check accept: keep one"
            )
    return {name: texts[0] for name, texts in captions.items()}


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'{where}: the file name is {value!r}: write the picture\'s name, such as "image_1.png"')
    path = PurePosixPath(unicodedata.normalize("NFC", value.strip()).replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or path.parts[:1] == () or path.parts[0].endswith(":"):
        raise InputError(f"{where}: {value!r} is not inside the dataset folder: write the path relative to it")
    return str(path)  # PurePosixPath has dropped "./"


def _text(value: object, where: str) -> str:
    """The text on one line; "" (no caption yet) for null or blanks."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: the caption is {value!r}: write a text in quotes")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # half an emoji: JSON can encode it, UTF-8 cannot
        raise InputError(f"{where}: the caption has a broken character (half an emoji?): type it again")
    return " ".join(filter(None, map(str.strip, value.splitlines())))


def _decoded(path: Path, encodings: tuple[str, ...] = ("utf-8-sig",)) -> str:
    for encoding in encodings:
        try:
            return path.read_bytes().decode(encoding)
        except UnicodeDecodeError:
            continue
    raise InputError(f"{path} is not UTF-8: save it again with the encoding UTF-8")


def _jsonl_objects(path: Path) -> Iterator[tuple[str, dict]]:
    # not splitlines(): it would also cut at U+2028, which JSON allows inside a text
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            row = _json(line, where)
            if not isinstance(row, dict):
                raise InputError(f'{where}: not a row like {{"file_name": "image_1.png", "text": "..."}}')
            yield where, row


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for where, row in _jsonl_objects(path):
        name, text = _field(row, NAME_FIELDS, where), _field(row, TEXT_FIELDS, where)
        yield where, row[name], row[text]


def _csv_rows(path: Path) -> Iterator[Row]:
    # Korean Excel saves "CSV" in cp949 and only "CSV UTF-8" in UTF-8
    text = _decoded(path, ("utf-8-sig", "cp949"))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # strict: a missing quote must not swallow the rest
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                name, text = _field(header, NAME_FIELDS, where), _field(header, TEXT_FIELDS, where)
                continue
            if len(cells) != len(header):
                raise InputError(
                    f"{where}: {len(cells)} cells where the header has {len(header)}: "
                    f"put a text that has commas in double quotes"
                )
            row = dict(zip(header, cells, strict=True))
            yield where, row[name], row[text]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}: check the double quotes") from None


def _json_rows(path: Path) -> Iterator[Row]:
    # pairs, not a dict: of a name that is there twice Python would keep the last without a word
    pairs = _json(_decoded(path), str(path), object_pairs_hook=list)
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise InputError(f'{path}: not a mapping like {{"image_1.png": "a caption"}}')
    for name, text in pairs:
        yield f"{path}, {name}", name, text


def _txt_rows(root: Path) -> Iterator[Row]:
    for name, picture in pictures(root).items():
        path = picture.with_suffix(".txt")
        if path.is_file():
            yield str(path), name, _decoded(path, ("utf-8-sig", "cp949"))


def _json(text: str, where: str, **options):
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if ", line " not in where else ""
        raise InputError(f"{where}{line}: not JSON ({error.msg}, column {error.colno}): correct that line") from None


def _field(row: Iterable[str], fields: tuple[str, ...], where: str) -> str:
    name = next((field for field in fields if field in row), None)
    if name is None:
        raise InputError(f"{where}: no field {fields[0]!r} among {', '.join(map(repr, row))}: name it {fields[0]!r}")
    return name


# ---- writing


def _contents(root: Path, captions: dict[str, str], form: str) -> dict[Path, bytes]:
    """File -> its new content."""
    path = root / f"metadata.{form}"
    if form == "jsonl":
        return {path: _jsonl(captions, _other_fields(path)).encode()}
    if form == "csv":
        file = io.StringIO(newline="")
        csv.writer(file, lineterminator="\n").writerows([("file_name", "text"), *captions.items()])
        return {path: file.getvalue().encode("utf-8-sig")}  # without the byte order mark Excel decodes it as cp949
    if form == "json":
        return {path: (json.dumps(captions, ensure_ascii=False, indent=2) + "\n").encode()}
    files = pictures(root)
    contents: dict[Path, bytes] = {}
    for name, text in captions.items():
        beside = files.get(name, root / name).with_suffix(".txt")
        if contents.setdefault(beside, content := f"{text}\n".encode()) != content:
            raise InputError(f"{name} and another picture would share {beside.name}: rename one of the pictures")
    return contents


def _jsonl(captions: dict[str, str], other_fields: dict[str, dict]) -> str:
    names = sorted({**captions, **other_fields}, key=natural_key)
    rows = ({"file_name": name, "text": captions.get(name, ""), **other_fields.get(name, {})} for name in names)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _other_fields(path: Path) -> dict[str, dict]:
    """Image name -> the user's own fields in a metadata.jsonl, for the rows that have any."""
    if not path.is_file():
        return {}
    other_fields = {}
    for where, row in _jsonl_objects(path):
        name = _field(row, NAME_FIELDS, where)
        others = {key: value for key, value in row.items() if key not in (name, _field(row, TEXT_FIELDS, where))}
        if others:
            other_fields[_name(row[name], where)] = others
    return other_fields
