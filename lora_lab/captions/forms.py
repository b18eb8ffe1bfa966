"""The rows of caption files: JSON lines, CSV, JSON, and one text file beside each image, in any encoding.

A row is a name and a text as they stand in the file; files.py checks them and finds the image that a name means. The
encoding is decided by evidence, told once, and refused where in doubt."""

import codecs
import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from lora_lab.console import cut, say_once
from lora_lab.errors import InputError

# UTF-32's first: that of UTF-16 is its beginning.
MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
UNUSED = ("Cc", "Cf", "Cn", "Co", "Cs")  # categories of letters that a text read in the wrong encoding has
SPACES = "\t\n\r\u200b\u200c\u200d\u2028\ufeff"  # of these categories, and in real texts

# Of the encodings with two bytes a letter: the first bytes of common letters (the second is above 0xA0 in the last
# three). What another encoding makes of the same bytes are rare ones, such as Hangul that no Korean word has.
COMMON_LETTERS = {
    "cp932": ((0x81, 0x83), (0x88, 0x97)),  # punctuation and kana, kanji of level 1
    "big5": ((0xA1, 0xA1), (0xA4, 0xC6)),
    "gb18030": ((0xA1, 0xA1), (0xA3, 0xA3), (0xB0, 0xD7)),
    "cp949": ((0xA1, 0xA1), (0xA3, 0xA3), (0xB0, 0xC8)),  # the 2350 Hangul of KS X 1001
    "euc_jp": ((0xA1, 0xA5), (0xB0, 0xCF)),
}
SECOND_BYTE_HIGH = ("gb18030", "cp949", "euc_jp")
# Of those with one byte a letter: what a language has beside a to z. A text is in one language.
ALPHABETS = {
    "cp1252": ("äöüß", "àâæçéèêëîïôœùûüÿ", "áéíñóúü", "àáâãçéêíóôõú", "åäæéöø", "àèéìîòù"),
    "cp1250": ("ąćęłńóśźż", "áäčďéěíĺľňóôŕřšťúůýž", "áéíóöőúüű", "ćčđšž", "âăîşţ"),
    "cp1254": ("âçğıîöşüû",),
    "cp1251": ("абвгдежзийклмнопрстуфхцчшщъыьэюяёєіїґўћђљњџј",),
    "cp1253": ("αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ",),
}
LATIN = ("cp1252", "cp1250", "cp1254")
FEW = 6  # different bytes, of one to six letters, are no evidence for another script
TYPOGRAPHY = "‘’‚“”„–—…«»°€•¿¡"
WORDS = (
    "à",
    "á",
    "è",
    "é",
    "í",
    "ò",
    "ó",
    "å",
    "æ",
    "ö",
    "ø",
)  # a word in Latin letters has one of a to z, but for these
MARGIN, LATIN_MARGIN = 0.02, 0.15  # of the evidence for an encoding over that for another one, out of about 1


def decode_files(contents: Sequence[bytes], source: Path) -> list[str]:
    """The texts of files that were saved by one program, `source` being the file or their folder.

    UTF-8 and UTF-16 are recognised file by file, with a byte order mark and without; any other encoding by all files
    together, since a sentence is little evidence, and it is told which. Raises InputError, naming `source`, where it is
    in doubt, and for what is no text."""
    texts = [_unicode(content, source) for content in contents]
    others = [content for content, text in zip(contents, texts, strict=True) if text is None]
    encoding = _legacy_encoding(b"\n".join(others), source) if others else ""
    utf16 = [text for content, text in zip(contents, texts, strict=True) if text and _utf16(content)]
    if utf16:
        say_once(f"{source} is read as UTF-16: {_sample(utf16[0])}")
    return [content.decode(encoding) if text is None else text for content, text in zip(contents, texts, strict=True)]


def _unicode(content: bytes, source: Path) -> str | None:
    """The text in UTF-8 or UTF-16; None if it is in neither."""
    utf16 = _utf16(content)
    try:
        text = content.decode(utf16 or "utf-8-sig")
    except UnicodeDecodeError:
        if utf16 is None:
            return None
        text = "\0"
    if utf16 and not all(letter in SPACES or unicodedata.category(letter) not in UNUSED for letter in set(text)):
        raise InputError(f"{source} is not a text: it has NUL letters; save it again with the encoding UTF-8")
    return text


def _utf16(content: bytes) -> str | None:
    """The name of UTF-16 or UTF-32 where a byte order mark or NUL bytes, which a letter of a to z has, tell of it."""
    marked = next((encoding for mark, encoding in MARKS if content.startswith(mark)), None)
    if marked is None and b"\0" in content:
        return "utf-16-be" if content[::2].count(0) > content[1::2].count(0) else "utf-16-le"
    return marked


@lru_cache(16)  # the stages of a pipeline read the same files
def _legacy_encoding(content: bytes, source: Path) -> str:
    """The encoding with the most evidence. Raises InputError where another one is as likely and reads another text."""
    from charset_normalizer import from_bytes

    evidence: dict[str, tuple[float, str]] = {}  # text -> evidence, encoding
    for encoding in [*COMMON_LETTERS, *ALPHABETS]:
        for match in from_bytes(content, cp_isolation=[encoding], threshold=0.5):
            text = content.decode(encoding)
            evidence.setdefault(text, (_common(text, encoding) - match.chaos + match.coherence / 4, encoding))
    ranking = sorted(evidence.items(), key=lambda item: item[1][0], reverse=True)
    if not ranking or ranking[0][1][0] < 0.5:
        raise InputError(f"{source} is not UTF-8, nor any other known encoding: save it again with the encoding UTF-8")
    text, (score, encoding) = ranking[0]
    for other, (other_score, other_encoding) in ranking[1:]:
        if score - other_score >= (LATIN_MARGIN if {encoding, other_encoding}.issubset(LATIN) else MARGIN):
            continue
        same = next((i for i, letters in enumerate(zip(text, other, strict=False)) if len({*letters}) > 1), 0)
        raise InputError(
            f"{source} is not UTF-8, and may be {encoding} ({_sample(text[same:])}) or {other_encoding} "
            f"({_sample(other[same:])}): save it again with the encoding UTF-8"
        )
    say_once(f"{source} is not UTF-8 and is read as {encoding}: {_sample(text)}")
    return encoding


def _common(text: str, encoding: str) -> float:
    """The fraction of letters outside ASCII that are common in the languages of the encoding."""
    letters = [letter for letter in text if letter > "\x7f"]
    if encoding not in LATIN and len({byte for byte in text.encode(encoding) if byte > 0x7F}) < FEW:
        return 0.0
    if encoding in COMMON_LETTERS:
        words = re.findall(r"[^\x00-\x7f]{2,}", text)  # one such letter alone is a dash or an apostrophe of cp1252
        return sum(_is_common(letter.encode(encoding), encoding) for letter in "".join(words)) / len(letters)
    if encoding not in LATIN:  # a word is not in two scripts
        words = [word for word in re.findall(r"[^\W\d_]+", text.lower()) if not re.search("[a-z]", word)]
        return sum(letter in ALPHABETS[encoding][0] for letter in "".join(words)) / len(letters)
    letters = [letter for letter in letters if letter not in TYPOGRAPHY]
    words = [word for word in re.findall(r"[^\W\d_]+", text.lower()) if re.search("[a-z]", word) or word in WORDS]
    shares = [sum(letter in alphabet for letter in "".join(words)) for alphabet in ALPHABETS[encoding]]
    return max(shares) / len(letters) if letters else 1.0


def _is_common(code: bytes, encoding: str) -> bool:
    in_rows = any(first <= code[0] <= last for first, last in COMMON_LETTERS[encoding])
    return len(code) == 2 and in_rows and (code[1] > 0xA0 or encoding not in SECOND_BYTE_HIGH)


def _sample(text: str) -> str:
    """The first words that are not in ASCII, which a person recognises, or the first words."""
    found = re.search(r"[^\s\x80-\uffff]{0,9}[^\x00-\x7f].{0,19}", text) or re.search(r"\S.{0,19}", text)
    return cut(found[0].strip(' "') if found else "")


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
