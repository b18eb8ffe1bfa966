r"""Refining by rules: a captioner's words become a training caption that names the character once.

A caption is phrases between commas. A rule is a regular expression and its replacement, applied to each phrase by
itself, in order and without regard to case; a phrase of which nothing is left is dropped. So one list can drop a word
("arafed"), a phrase ("^with \w+ skin$") or put it in other words ("^winking$" -> "winking with its left eye").
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_lab.captions.files import read_caption_file
from lora_lab.errors import InputError

Pairs = tuple[tuple[re.Pattern, str], ...]

# While rules run the trigger is this one private letter: no rule can change it, whatever characters it is made of.
MARK = "\ue000"

ROUNDS = 10

# Words which can't stand between an article and its noun, and of which one must follow a subject ("a cat with a hat",
# but not "a cat costume" or "an orange hat").
FUNCTION_WORDS = (
    "a|an|the|with|without|in|on|of|at|by|for|from|to|into|onto|over|under|above|below|behind|beside|near|next|"
    "against|between|inside|outside|through|up|down|out|off|as|like|while|and|or|but|that|which|who|whose|is|are|was|"
    "has|have|sits|stands|lies|looks|smiles|holds|wears|waves|rides|made|it|its|his|her|their"
)

# What leads to a second mention and goes with it.
_LED = r"(?:\b(?:and|with|of|by|next\s+to)\s+)?(?:\b(?:a|an|the)\s+)?"


@dataclass(frozen=True)
class Rules:
    """replace: the captioner's habits; vocabulary: its words -> the training set's; both (pattern, replacement).
    subjects: nouns that the trigger takes the place of. article: what stands before the trigger then, "" for nothing.
    repeats: whether repetitions are dropped."""

    replace: Pairs = ()
    vocabulary: Pairs = ()
    subjects: tuple[str, ...] = ()
    article: str = "A"
    repeats: bool = True

    @classmethod
    def from_config(
        cls,
        replace: Iterable[Mapping[str, str]] = (),
        vocabulary: Iterable[Mapping[str, str]] = (),
        subjects: Iterable[str] = (),
        article: str = "A",
        drop_repeats: bool = True,
    ) -> "Rules":
        """From plain values; a rule is {"pattern": ..., "replacement": ...}, the replacement "" if left out.

        Raises InputError that names the rule whose pattern or replacement is wrong."""
        return cls(
            _pairs(replace, "refiner.replace"),
            _pairs(vocabulary, "refiner.vocabulary"),
            tuple(subjects),
            article.strip(),
            drop_repeats,
        )


def refine(caption: str, trigger: str, rules: Rules, hint: str = "") -> str:
    """The caption cleaned by the rules, with the trigger exactly once and the user's hint for that picture at its end.

    refine(refine(c)) == refine(c) for any rules: they run until nothing changes. Rules that never come to rest raise
    InputError."""
    spelling = _spelling(trigger)
    hint = ", ".join(_phrases(re.sub(_LED + MARK, "", spelling.sub(MARK, hint), flags=re.IGNORECASE)))
    for _ in range(ROUNDS):
        text = _without_hint(spelling.sub(MARK, caption.replace(MARK, "")), hint)
        text = rewrite(text, rules.replace)
        text = drop_repeats(text) if rules.repeats else text
        text = rewrite(text, rules.vocabulary)
        text = name_subject(text, MARK, rules.subjects, rules.article)
        text = add_hint(trigger_once(add_trigger(text, MARK), MARK), hint)
        before, caption = caption, text.replace(MARK, trigger)
        if caption == before:
            return caption
    raise InputError(
        f"the refiner's rules turn {before!r} into {caption!r} and so on without end: "
        f"mend the rule in refiner.replace or refiner.vocabulary that undoes another or itself"
    )


def rewrite(caption: str, pairs: Pairs) -> str:
    """Apply (pattern, replacement) pairs in order to each comma phrase.

    >>> rewrite("there is a ghost, winking", ((re.compile("^there is "), ""), (re.compile("^winking$"), "blinking")))
    'a ghost, blinking'
    """
    if not pairs:
        return caption
    phrases = []
    for phrase in _phrases(caption):
        for pattern, replacement in pairs:
            phrase = " ".join(pattern.sub(replacement, phrase).split())
        phrases.append(phrase)
    return _tidy(", ".join(phrases))


def drop_repeats(caption: str) -> str:
    """Drop what is said twice in a row, and phrases that were there before.

    >>> drop_repeats("a man with a mustache and mustache, smiling, with a hat and a hat, Smiling")
    'a man with a mustache, smiling, with a hat'
    """
    stutter = r"\b((?:\w+\s+){0,4}\w+)(?:\s+(?:and\s+)?(?:(?:a|an|the)\s+)?\1\b)+"
    said: dict[str, str] = {}
    for phrase in _phrases(caption):
        phrase = re.sub(stutter, r"\1", phrase, flags=re.IGNORECASE)
        said.setdefault(phrase.casefold(), phrase)
    return ", ".join(said.values())


def name_subject(caption: str, trigger: str, subjects: Iterable[str], article: str) -> str:
    """Put the trigger in the place of the subject, adjectives included; its phrase comes first.

    >>> name_subject("a cartoon white ghost with a purple background, smiling", "HANA_TOFU", ["ghost"], "A")
    'A HANA_TOFU with a purple background, smiling'

    A caption that has the trigger, or no subject, is left as it is."""
    nouns = "|".join(r"\s+".join(map(re.escape, noun.split())) for noun in subjects)
    if not nouns or trigger in caption:
        return caption
    word = rf"(?!(?:{FUNCTION_WORDS}|\w+ing)\b)[\w'-]+\s+"
    subject = re.compile(
        rf"(?:(?:a|an|the|one)\s+)?(?:\w+ing\s+)?(?:{word}|and\s+){{0,6}}(?:{nouns})s?"
        rf"(?=$|['.:;!?(]|\s+(?:(?:{FUNCTION_WORDS})\b|[\w-]+(?:ing|ed)\b))",
        re.IGNORECASE,
    )
    phrases = _phrases(caption)
    for i, phrase in enumerate(phrases):
        if found := subject.match(phrase):
            named = f"{article} {trigger}".strip() + phrase[found.end() :]
            return ", ".join([named, *phrases[:i], *phrases[i + 1 :]])
    return caption


def add_trigger(caption: str, trigger: str) -> str:
    """Name the character if the caption does not.

    >>> add_trigger("waving in the snow", "HANA_TOFU")
    'HANA_TOFU, waving in the snow'
    """
    if trigger in caption:
        return caption
    return f"{trigger}, {caption}" if caption.strip() else trigger


def trigger_once(caption: str, trigger: str) -> str:
    """Keep the first of several triggers; what led to another ("and a ...") goes with it.

    >>> trigger_once("A HANA_TOFU in the snow, a HANA_TOFU waving", "HANA_TOFU")
    'A HANA_TOFU in the snow, waving'
    """
    head, found, tail = caption.partition(trigger)
    if trigger not in tail:
        return caption
    return _tidy(head + found + re.sub(_LED + re.escape(trigger), "", tail, flags=re.IGNORECASE))


def add_hint(caption: str, hint: str) -> str:
    """Append what the user wrote for that picture, unless it is there.

    >>> add_hint("A HANA_TOFU waving", "in the snow")
    'A HANA_TOFU waving, in the snow'
    """
    if not hint or re.search(rf"(?:^|,)\s*{re.escape(hint)}\s*(?:,|$)", caption, re.IGNORECASE):
        return caption
    return f"{caption}, {hint}" if caption else hint


def read_hints(root: Path) -> dict[str, str]:
    """What the user knows of a picture and a captioner can't see: hints.jsonl or hints.csv in the dataset folder."""
    files = [path for path in (Path(root) / "hints.jsonl", Path(root) / "hints.csv") if path.is_file()]
    if len(files) > 1:
        raise InputError(f"{files[0].name} and {files[1].name} are both in {root}: keep one of them")
    return read_caption_file(files[0]) if files else {}


def _pairs(rules: Iterable[Mapping[str, str]], key: str) -> Pairs:
    pairs = []
    for i, rule in enumerate(rules):
        pattern, replacement = rule["pattern"], rule.get("replacement") or ""
        try:
            compiled = re.compile(pattern, re.IGNORECASE)
            compiled.sub(replacement, "")  # a wrong group number shows here, not at the first caption that matches
        except (re.error, IndexError) as error:
            raise InputError(f"{key}[{i}]: {pattern!r} -> {replacement!r} is no regular expression: {error}") from None
        pairs.append((compiled, replacement))
    return tuple(pairs)


def _spelling(trigger: str) -> re.Pattern:
    """The trigger in any case and as captioners take it apart: HANA_TOFU, hana_tofu, "hana _ tofu"."""
    parts = re.findall(r"[^\W_]+|[^\w\s]|_", trigger)
    return re.compile(r"(?<!\w)" + r"\s*".join(map(re.escape, parts)) + r"(?!\w)", re.IGNORECASE)


def _without_hint(caption: str, hint: str) -> str:
    """Without the hint at its end: rules are for the captioner's words, not for the user's."""
    return re.sub(rf"(?:^|,)\s*{re.escape(hint)}\s*$", "", caption, flags=re.IGNORECASE) if hint else caption


def _phrases(caption: str) -> list[str]:
    return [phrase for phrase in (" ".join(part.split()) for part in caption.split(",")) if phrase]


def _tidy(caption: str) -> str:
    """Without empty phrases, and without the "and" or "with a" that a removed word leaves at a phrase's end."""
    loose = r"^(?:and|or)\s+|(?:^|\s+)(?:and|or|with|of|a|an|the)$"
    phrases = _phrases(caption)
    while (shorter := [re.sub(loose, "", phrase, flags=re.IGNORECASE) for phrase in phrases]) != phrases:
        phrases = _phrases(", ".join(shorter))
    return ", ".join(phrases)
