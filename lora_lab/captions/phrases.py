"""Phrases that most captions share: what they say of the character, its trigger should stand for."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import NamedTuple

from lora_lab.captions.rules import PARTICIPLE, trigger_pattern

MOST_WORDS = 77  # of a caption that are compared: comparing all runs of a megabyte would take minutes
FEWEST = 3  # captions, of which something can be said
STOPWORDS = {"a", "an", "the", "and", "or", "of", "in", "on", "at", "with", "its", "it", "is", "to", "by", "for"}
# What leads to a noun: besides the above, a phrase neither begins nor ends with it.
_LEADING = (
    "his her their this that these those there which who whose are was were has have had having as from into onto up "
    "out off over under above below near next behind beside between against without while wears wearing holds holding "
    "carrying showing featuring both some front"
)
LEADING = STOPWORDS | {*_LEADING.split()}
COLOURS = frozenset({
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "grey", "gray",
    "beige", "teal", "turquoise", "cyan", "magenta", "gold", "golden", "silver", "maroon", "navy", "olive", "lime",
    "lavender", "crimson", "scarlet", "indigo", "tan", "cream",
})  # fmt: skip
# What one noun may have by turns besides a colour: a number, size, shape or material.
_ATTRIBUTES = (
    "one two three four five six single double many big small large little tiny huge long short tall thick thin wide "
    "narrow fat slim round square oval rectangular triangular pointed pointy curved curly straight wavy spiky flat "
    "smooth soft hard fluffy fuzzy furry shiny glossy bright dark light pale deep colorful colourful transparent blond "
    "blonde wooden metal metallic plastic leather woolen striped spotted dotted checkered plain"
)
ATTRIBUTES = COLOURS | {*_ATTRIBUTES.split()}
BACKGROUND = re.compile(r"(?:back(?:ground|drop))s?")


class _Found(NamedTuple):
    """Where a phrase is: in which captions, behind which adjectives and before which nouns, "" for none."""

    captions: set[int]
    left: set[str]
    right: set[str]

    @property
    def varies(self) -> bool:
        """Whether the phrase is only a part of what differs from caption to caption: "eyes" of sad and of big eyes."""
        return len(self.left - {""}) > 1 or len(self.right - {""}) > 1


@dataclass(frozen=True)
class CommonWords:
    """What the captions of one character have in common."""

    captions: int
    shared: dict[str, int]  # phrase in four of five captions -> in how many
    constant: dict[str, int]  # "red body" -> in how many captions, which are all that mention the body

    @classmethod
    def of(cls, captions: Sequence[str], trigger: str, class_noun: str) -> "CommonWords":
        """Of the captions of all images of the character."""
        shared = shared_phrases(captions, trigger, class_noun)
        return cls(len(captions), shared, constant_attributes(captions, trigger, class_noun))


def shared_phrases(captions: Sequence[str], trigger: str, class_noun: str = "") -> dict[str, int]:
    """The runs of words in four of five captions or more, in lower case, and in how many; {} below 3 captions.

    A part of a longer one is left out if no more captions have it; so are the trigger, the class noun, and at both ends
    words such as "with a".

    >>> shared_phrases(["A TOFU with a red hat, smiling", "TOFU in a red hat", "TOFU, a red hat, winking"], "TOFU")
    {'red hat': 3}
    """
    if len(captions) < FEWEST:
        return {}
    texts = [_runs(caption, trigger, class_noun) for caption in captions]
    least = -(-len(texts) * 4 // 5)
    words = Counter(word for runs in texts for word in {word for run in runs for word in run})
    frequent = {word for word, count in words.items() if count >= least}
    found: dict[str, _Found] = {}
    for i, runs in enumerate(texts):
        for phrase, left, right in (place for run in runs for place in _phrases(run, frequent)):
            place = found.setdefault(phrase, _Found(set(), set(), set()))
            place.captions.add(i)
            place.left.add(left)
            place.right.add(right)
    counts = {p: len(f.captions) for p, f in found.items() if len(f.captions) >= least and not f.varies}
    shared: dict[str, int] = {}
    for phrase in sorted(counts, key=len, reverse=True):
        if not any(counts[longer] == counts[phrase] and f" {phrase} " in f" {longer} " for longer in shared):
            shared[phrase] = counts[phrase]
    return {phrase: shared[phrase] for phrase in counts if phrase in shared}


def constant_attributes(captions: Sequence[str], trigger: str, class_noun: str = "") -> dict[str, int]:
    """Nouns in half of the captions or more, and at least 3, that always have the same number, size, shape, colour or
    material; and in how many captions they are.

    Without backgrounds, and without what `shared_phrases` has.

    >>> constant_attributes(["TOFU, red body", "TOFU with a red body", "a red body, TOFU", "TOFU", "TOFU up"], "TOFU")
    {'red body': 3}
    """
    mentions: dict[str, dict[int, list[list[str]]]] = {}  # noun -> number of the caption -> it with its adjectives
    for i, caption in enumerate(captions):
        for group in (group for run in _runs(caption, trigger, class_noun) for group in _groups(run)):
            mentions.setdefault(group[-1], {}).setdefault(i, []).append(group)
    shared, constant = shared_phrases(captions, trigger, class_noun), {}
    for noun, found in mentions.items():
        common = _common_end([group for groups in found.values() for group in groups])
        phrase, count = " ".join(common), len(found)
        if noun in ATTRIBUTES or not ATTRIBUTES & {*common} or is_background(phrase):
            continue
        if count >= max(FEWEST, len(captions) / 2) and not any(f" {phrase} " in f" {longer} " for longer in shared):
            constant[phrase] = count
    return constant


def repeated_captions(captions: Mapping[str, Sequence[str]], triggers: Sequence[str]) -> list[list[str]]:
    """Groups of images of which the captions are equal, but for case and space, and have more than a trigger."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, own in captions.items():
        names.setdefault(tuple(" ".join(text.casefold().split()) for text in own), []).append(name)
    bare = {f"{article}{trigger.casefold()}" for trigger in triggers for article in ("", "a ", "an ")}
    return [group for texts, group in names.items() if len(group) > 1 and not {*texts} <= bare]


def is_background(phrase: str) -> bool:
    """Whether the phrase is about what is behind the character."""
    return any(map(BACKGROUND.fullmatch, phrase.split()))


def _runs(caption: str, trigger: str, class_noun: str) -> list[list[str]]:
    """The words, in lower case, between punctuation, the trigger, the class noun, and around a background."""
    text = trigger_pattern(trigger).sub(",", caption)
    text = re.sub(rf"(?<!\w){re.escape(class_noun)}(?!\w)", ",", text, flags=re.IGNORECASE) if class_noun else text
    words = [match[0] for match in islice(re.finditer(r"[\w'-]+|[^\s\w]", text.lower()), MOST_WORDS)]
    runs, run = [], []
    for word in [*words, ","]:
        if not re.match(r"\w", word):
            runs, run = [*runs, run], []
        elif BACKGROUND.fullmatch(word):
            start = next((place + 1 for place in reversed(range(len(run))) if run[place] in LEADING), 0)
            runs, run = [*runs, run[:start], [*run[start:], word]], []
        else:
            run.append(word)
    return [run for run in runs if run]


def _phrases(run: Sequence[str], frequent: set[str]) -> Iterator[tuple[str, str, str]]:
    """Every phrase of the run that has only `frequent` words, with the adjective before it and the noun after it."""
    parts = [word if _is_part(word) else "" for word in run]
    for start, first in enumerate(run):
        if first in LEADING:
            continue
        for end in takewhile(lambda place: run[place] in frequent, range(start, len(run))):
            if run[end] in LEADING or (start == end and is_background(first)):
                continue
            after = end + 2 if run[end + 1 : end + 2] in (["is"], ["are"]) else end + 1  # "the wall is red"
            left = parts[start - 1] if start and parts[start] else ""
            right = parts[after] if after < len(run) and parts[end] else ""
            yield " ".join(run[start : end + 1]), left, right


def _is_part(word: str) -> bool:
    """Whether a word may be a noun or its adjective."""
    return word not in LEADING and not re.fullmatch(PARTICIPLE, word)


def _groups(run: Sequence[str]) -> Iterator[list[str]]:
    """The words of the run between leading words and participles: adjectives and their noun."""
    group: list[str] = []
    for word in [*run, "a"]:
        if _is_part(word):
            group.append(word)
        elif group:
            yield group
            group = []


def _common_end(groups: Sequence[Sequence[str]]) -> list[str]:
    """The words with which all groups end."""
    columns = zip(*(reversed(group) for group in groups), strict=False)
    return [words[0] for words in takewhile(lambda words: len({*words}) == 1, columns)][::-1]
