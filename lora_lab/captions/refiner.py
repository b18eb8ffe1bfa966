"""The refiner: any class or function that `refiner._target_` names and whose result rewrites captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from lora_lab.captions.files import read_caption_file, refuse_outward
from lora_lab.captions.phrases import is_background, shared_phrases
from lora_lab.captions.rules import without_hint
from lora_lab.captions.strip import phrase_pattern, strip_phrases
from lora_lab.captions.syntax import languages_of
from lora_lab.errors import InputError, RunError
from lora_lab.images.dataset import list_names
from lora_lab.settings.setting import bind_target, call_target

AUTO = "auto"  # of refiner.strip: the phrases that the folder's captions share
ROUNDS = 5  # of stripping and refining again
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


@dataclass(frozen=True)
class StrippingRefiner:
    """A refiner of which the captions are stripped of phrases."""

    refiner: Refiner
    phrases: tuple[str, ...]

    @property
    def remarks(self) -> Mapping[tuple[str, str], str]:
        """Those of the refiner."""
        return getattr(self.refiner, "remarks", {})

    def cost(self) -> str:
        """That of the refiner, "" without one."""
        return self.refiner.cost() if hasattr(self.refiner, "cost") else ""

    def refine(self, captions: Sequence[str], hints: Sequence[str], trigger: str) -> list[str]:
        """See Refiner."""
        return strip_refined(
            self.refiner, run_refiner(self.refiner, captions, trigger, hints), hints, trigger, self.phrases
        )


def check_refiner(settings: Settings) -> None:
    """Raise InputError, naming the key, for a refiner that is not installed or whose settings are wrong."""
    strip_setting(settings)
    bind_target("refiner", _arguments(settings))


def load_refiner(settings: Settings) -> Refiner:
    """The refiner of `settings`: `_target_` called with all keys but `strip`, whose phrases its captions do not have.

    `auto` strips nothing here: only stage=refine knows the captions of a folder.
    Raises InputError, naming the key, if it is not installed or its settings are wrong."""
    phrases, refiner = strip_setting(settings), call_target("refiner", _arguments(settings))
    return StrippingRefiner(refiner, tuple(phrases)) if phrases and phrases != AUTO else refiner


def strip_setting(settings: Settings) -> list[str] | Literal["auto"]:
    """`refiner.strip`. Raises InputError unless it is `auto` or a list of phrases."""
    value = settings.get("strip") or []
    if value != AUTO and not isinstance(value, list):
        raise InputError(f"refiner.strip={value}: write auto or a list of phrases, such as [{value}]")
    if value != AUTO:
        for phrase in value:
            phrase_pattern(str(phrase))
    return AUTO if value == AUTO else [str(phrase) for phrase in value]


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


def strip_refined(
    refiner: Refiner, refined: Sequence[str], hints: Sequence[str], trigger: str, phrases: Sequence[str]
) -> list[str]:
    """The refined captions without the phrases; refining and stripping them again changes nothing.

    So they are refined once more, which for instance drops what is there twice now."""
    captions = [strip_phrases(c, phrases, trigger, hint) for c, hint in zip(refined, hints, strict=True)]
    changed = [i for i, caption in enumerate(captions) if caption != refined[i]]
    for _ in range(ROUNDS):
        if not changed:
            break
        again = run_refiner(refiner, [captions[i] for i in changed], trigger, [hints[i] for i in changed])
        new = {i: strip_phrases(text, phrases, trigger, hints[i]) for i, text in zip(changed, again, strict=True)}
        changed = [i for i in changed if new[i] != captions[i]]
        captions = [new.get(i, caption) for i, caption in enumerate(captions)]
    return captions


def strip_shared(
    refiner: Refiner, captions: Mapping[str, str], hints: Mapping[str, str], trigger: str, class_noun: str
) -> tuple[list[str], dict[str, str]]:
    """The phrases that most of the refined captions share, besides backgrounds and what hints say, and the captions
    without them."""
    own, texts, phrases = [hints.get(name, "") for name in captions], [*captions.values()], []
    while True:
        described = [without_hint(text, hint) for text, hint in zip(texts, own, strict=True)]
        shared = shared_phrases(described, trigger, class_noun)
        new = [phrase for phrase in shared if not is_background(phrase) and phrase not in phrases]
        if not new:
            return phrases, dict(zip(captions, texts, strict=True))
        phrases += new
        texts = strip_refined(refiner, texts, own, trigger, phrases)


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


def _arguments(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key != "strip"}
