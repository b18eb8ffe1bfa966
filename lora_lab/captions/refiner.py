"""The refiner: any class or function that `refiner._target_` names and whose result rewrites captions."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lora_lab.captions.files import read_caption_file, refuse_outward
from lora_lab.errors import InputError, RunError
from lora_lab.images.dataset import list_names
from lora_lab.settings.setting import bind_target, call_target

# By the first word of Unicode's names of letters; CLIP was trained on English.
LANGUAGES = {
    "HANGUL": "Korean", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "CJK": "Chinese", "CYRILLIC": "Cyrillic",
    "GREEK": "Greek", "ARABIC": "Arabic", "HEBREW": "Hebrew", "THAI": "Thai", "DEVANAGARI": "Hindi",
}  # fmt: skip
Settings = Mapping[str, Any]  # the group `refiner` of the configuration


class Refiner(Protocol):
    """What a refiner must offer."""

    def refine(self, captions: Sequence[str], hints: Sequence[str], trigger: str) -> list[str]:
        """One caption that names the character by `trigger` for each of `captions`, in order.

        `hints` has what the user wrote for each image, "" for nothing. A refined caption should stay the same if
        refined again: stage=refine may run several times.

        A refiner that has something to tell of a caption also has `remarks`, a dict of sentences by the caption and the
        hint that it was given; one that costs something has `cost() -> str`, a line, or "" for nothing."""
        ...


def check_refiner(settings: Settings) -> None:
    """Raise InputError, naming the key, for a refiner that is not installed or whose settings are wrong."""
    bind_target("refiner", settings)


def load_refiner(settings: Settings) -> Refiner:
    """The refiner of `settings`: `_target_` called with all other keys.

    Raises InputError, naming the key, if it is not installed or its settings are wrong."""
    return call_target("refiner", settings)


def run_refiner(
    refiner: Refiner, captions: Sequence[str], trigger: str, hints: Sequence[str] | None = None
) -> list[str]:
    """The refined captions, in order; `hints` has one text per caption, None for no hints.

    Raises RunError if the refiner returns another number of captions."""
    refined = refiner.refine(captions, hints or [""] * len(captions), trigger)
    if len(refined) != len(captions):
        name = type(refiner).__qualname__
        raise RunError(f"the refiner {name} returned {len(refined)} captions for {len(captions)}")
    return refined


def read_hints(root: Path, follow_links: bool = False) -> dict[str, str]:
    """Image name -> the user's hint, from hints.jsonl or hints.csv in the dataset folder; {} without such a file.

    Raises InputError for a malformed file, if both exist, and, without `follow_links`, for a link out of the folder."""
    files = [path for path in (Path(root) / "hints.jsonl", Path(root) / "hints.csv") if path.is_file()]
    if len(files) > 1:
        raise InputError(f"{files[0].name} and {files[1].name} are both in {root}: keep one of them")
    if not follow_links:
        refuse_outward(files, root)
    return read_caption_file(files[0]) if files else {}


def foreign_hints(captions: Mapping[str, str], hints: Mapping[str, str]) -> list[str]:
    """A line for each language, other than their own, that refined captions have from the hints of their images."""
    names: dict[str, list[str]] = {}
    for name, hint in hints.items():
        own = languages_of(captions[name].removesuffix(hint))
        for language in languages_of(hint) & languages_of(captions[name]) - own:
            names.setdefault(language, []).append(name)
    return [
        f"{list_names(named)}: the hint is {language} and stays in the caption: CLIP reads English, so translate it; "
        "refiner=[rules,llm] has it translated"
        for language, named in names.items()
    ]


def languages_of(text: str) -> set[str]:
    """The languages whose own scripts the text has letters of; none for Latin letters."""
    scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in set(text)}
    languages = {LANGUAGES[script] for script in scripts if script in LANGUAGES}
    return languages - {"Chinese"} if languages & {"Japanese", "Korean"} else languages
