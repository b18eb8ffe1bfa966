"""The text of files that people saved in any encoding: decided by evidence, told once, refused where in doubt."""

import codecs
import re
import unicodedata
from collections.abc import Sequence
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
