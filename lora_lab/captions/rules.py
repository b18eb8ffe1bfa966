r"""The rules refiner: regular expressions turn a captioner's words into a training caption with the trigger once.

A caption is a list of phrases between commas. A rule is a regular expression and its replacement, applied to each
phrase separately, in order, ignoring case; an empty phrase is dropped. So the same kind of rule can drop a word
("arafed"), a phrase ("^with \w+ skin$") or replace it ("^winking$" -> "winking with its left eye").
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from lora_lab.errors import InputError

Pairs = tuple[tuple[re.Pattern, str], ...]

# While rules run, this private-use character stands for the trigger: no rule can change it, whatever its characters.
MARK = "\ue000"

ROUNDS = 10

# Words that cannot stand between an article and its noun, and one of which must follow a subject ("a cat with a hat",
# but not "a cat costume" or "an orange hat").
FUNCTION_WORDS = (
    "a|an|the|with|without|in|on|of|at|by|for|from|to|into|onto|over|under|above|below|behind|beside|near|next|"
    "against|between|inside|outside|through|up|down|out|off|as|like|while|and|or|but|that|which|who|whose|is|are|was|"
    "has|have|sits|stands|lies|looks|smiles|holds|wears|waves|rides|made|it|its|his|her|their"
)

# A participle, which may also follow a subject ("a cat smiling"): a vowel comes before its ending, unlike in "red",
# "bed" and "king".
PARTICIPLE = r"[^\Waeiouy]*[aeiouy][\w-]*(?:ing|(?<!e)ed)"

# Words that introduce a second mention of the trigger and are removed with it.
_LED = r"(?:\b(?:and|with|of|by|next\s+to)\s+)?(?:\b(?:a|an|the)\s+)?"


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class Rule:
    """A regular expression and the text that replaces what it matches."""

    pattern: str
    replacement: str = ""


@dataclass(frozen=True)
class Rules:
    """A refiner that applies compiled rules."""

    replace: Pairs = ()  # (pattern, replacement) for the captioner's habits
    vocabulary: Pairs = ()  # (pattern, replacement): the captioner's words -> those of the training captions
    subjects: tuple[str, ...] = ()  # nouns that the trigger replaces
    article: str = "A"  # before the trigger where it replaces a subject; "" for none
    drop_repeats: bool = True

    def refine(self, captions: Sequence[str], hints: Sequence[str], trigger: str) -> list[str]:
        """Each caption refined by the rules, with the trigger exactly once and its hint, if not "", at the end.

        Raises InputError for rules that change their own result without end."""
        return [refine_caption(caption, trigger, self, hint) for caption, hint in zip(captions, hints, strict=True)]


def compile_rules(
    replace: Sequence[Rule] = (),
    vocabulary: Sequence[Rule] = (),
    subjects: Sequence[str] = (),
    article: str = "A",
    drop_repeats: bool = True,
) -> Rules:
    """The refiner of the keys of conf/refiner. Raises InputError, naming the rule, for a wrong regular expression."""
    return Rules(
        _compiled(replace, "refiner.replace"),
        _compiled(vocabulary, "refiner.vocabulary"),
        tuple(subjects),
        article.strip(),
        drop_repeats,
    )


def refine_caption(caption: str, trigger: str, rules: Rules, hint: str = "") -> str:
    """The caption refined by the rules, with the trigger exactly once and the user's hint for its image at the end.

    Refining a refined caption changes nothing, for any rules: they are repeated until the caption is stable.
    Raises InputError for rules that never reach a stable caption."""
    spelling = trigger_pattern(trigger)
    hint = ", ".join(_phrases(re.sub(_LED + MARK, "", spelling.sub(MARK, hint), flags=re.IGNORECASE)))
    for _ in range(ROUNDS):
        text = without_hint(spelling.sub(MARK, caption.replace(MARK, "")), hint)
        text = rewrite(text, rules.replace)
        text = drop_repeats(text) if rules.drop_repeats else text
        text = rewrite(text, rules.vocabulary)
        text = name_subject(text, MARK, rules.subjects, rules.article)
        text = add_hint(trigger_once(add_trigger(text, MARK), MARK), hint)
        text = text.replace(MARK, trigger)
        before, caption = caption, agree_article(text, trigger) if rules.article in ("A", "a", "An", "an") else text
        if caption == before:
            return caption
    raise InputError(
        f"the refiner's rules turn {before!r} into {caption!r} and so on without end: "
        f"correct the rule in refiner.replace or refiner.vocabulary that undoes another or itself"
    )


def rewrite(caption: str, pairs: Pairs) -> str:
    """Apply (pattern, replacement) pairs in order to each phrase.

    >>> rewrite("there is a ghost, winking", ((re.compile("^there is "), ""), (re.compile("^winking$"), "blinking")))
    'a ghost, blinking'
    """
    if not pairs:
        return caption
    phrases = []
    for phrase in _phrases(caption):
        new = phrase
        for pattern, replacement in pairs:
            new = " ".join(pattern.sub(replacement, new).split())
        phrases.append(phrase if new == phrase else tidy(new))
    return ", ".join(filter(None, phrases))


def drop_repeats(caption: str) -> str:
    """Drop words repeated in a row, and phrases that occurred before.

    >>> drop_repeats("a man with a mustache and mustache, smiling, with a hat and a hat, Smiling")
    'a man with a mustache, smiling, with a hat'
    """
    stutter = r"\b((?:\w+\s+){0,4}\w+)(?:\s+(?:and\s+)?(?:(?:a|an|the)\s+)?\1\b)+"
    phrases: dict[str, str] = {}
    for phrase in _phrases(caption):
        phrase = re.sub(stutter, r"\1", phrase, flags=re.IGNORECASE)
        phrases.setdefault(phrase.casefold(), phrase)
    return ", ".join(phrases.values())


def name_subject(caption: str, trigger: str, subjects: Iterable[str], article: str) -> str:
    """Replace the subject and its adjectives by the trigger, and move that phrase to the front.

    >>> name_subject("a cartoon white ghost with a purple background, smiling", "HANA_TOFU", ["ghost"], "A")
    'A HANA_TOFU with a purple background, smiling'

    "cartoon ..." is a cartoon of anything, up to the next function word or participle. A caption with the trigger, or
    without a subject, is returned unchanged."""
    word = rf"(?!(?:{FUNCTION_WORDS}|\w+ing)\b)[\w'-]+"
    parts = {"...": rf"{word}(?:\s+{word}){{0,6}}?"}
    nouns = "|".join(r"\s+".join(parts.get(part) or re.escape(part) for part in noun.split()) for noun in subjects)
    if not nouns or trigger in caption:
        return caption
    subject = re.compile(
        rf"(?:(?:a|an|the|one)\s+)?(?:\w+ing\s+)?(?:{word}\s+|and\s+){{0,6}}(?:{nouns})s?"
        rf"(?=$|['.:;!?(]|\s+(?:(?:{FUNCTION_WORDS})\b|(?:{PARTICIPLE})\b))",
        re.IGNORECASE,
    )
    phrases = _phrases(caption)
    for i, phrase in enumerate(phrases):
        if found := subject.match(phrase):
            named = f"{article} {trigger}".strip() + phrase[found.end() :]
            return ", ".join([named, *phrases[:i], *phrases[i + 1 :]])
    return caption


def agree_article(caption: str, trigger: str) -> str:
    """Write "an" before a trigger that begins with a vowel, and "a" before any other.

    >>> agree_article("A AKA_ROBO waving", "AKA_ROBO")
    'An AKA_ROBO waving'
    """
    vowel = re.match(r"(?!eu|uni|us[aeiou]|one)[aeiou]", trigger, re.IGNORECASE)
    return re.sub(
        rf"\b(a)n?(?=\s+{re.escape(trigger)}(?!\w))", r"\1n" if vowel else r"\1", caption, flags=re.IGNORECASE
    )


def add_trigger(caption: str, trigger: str) -> str:
    """Put the trigger in front of a caption without it.

    >>> add_trigger("waving in the snow", "HANA_TOFU")
    'HANA_TOFU, waving in the snow'
    """
    if trigger in caption:
        return caption
    return f"{trigger}, {caption}" if caption.strip() else trigger


def trigger_once(caption: str, trigger: str) -> str:
    """Keep the first of several triggers; words that introduce another ("and a ...") are removed with it.

    >>> trigger_once("A HANA_TOFU in the snow, a HANA_TOFU waving", "HANA_TOFU")
    'A HANA_TOFU in the snow, waving'
    """
    head, _, tail = caption.partition(trigger)
    if trigger not in tail:
        return caption
    again, parts = re.compile(_LED + re.escape(trigger), re.IGNORECASE), tail.split(",")
    before, comma, start = head.rpartition(",")
    phrases = [start + trigger + again.sub("", parts[0]), *(again.sub("", part) for part in parts[1:])]
    phrases = [tidy(new) if trigger in old else new for new, old in zip(phrases, parts, strict=True)]
    return ", ".join(_phrases(before + comma + ",".join(phrases)))


def add_hint(caption: str, hint: str) -> str:
    """Append the user's hint unless the caption has it.

    >>> add_hint("A HANA_TOFU waving", "in the snow")
    'A HANA_TOFU waving, in the snow'
    """
    if not hint or re.search(rf"(?:^|,)\s*{re.escape(hint)}\s*(?:,|$)", caption, re.IGNORECASE):
        return caption
    return f"{caption}, {hint}" if caption else hint


def _compiled(rules: Iterable[Rule], key: str) -> Pairs:
    pairs = []
    for i, rule in enumerate(rules):
        try:
            pattern = re.compile(rule.pattern, re.IGNORECASE)
            pattern.sub(rule.replacement, "")  # finds a wrong group number now, not at the first caption that matches
        except (re.error, IndexError) as error:
            raise InputError(
                f"{key}[{i}]: {rule.pattern!r} -> {rule.replacement!r} is not a regular expression: {error}"
            ) from None
        pairs.append((pattern, rule.replacement))
    return tuple(pairs)


def trigger_pattern(trigger: str) -> re.Pattern:
    """Matches the trigger in any case and with the spaces that captioners insert: HANA_TOFU, "hana _ tofu"."""
    parts = re.findall(r"[^\W_]+|[^\w\s]|_", trigger)
    return re.compile(r"(?<!\w)" + r"\s*".join(map(re.escape, parts)) + r"(?!\w)", re.IGNORECASE)


def without_hint(caption: str, hint: str) -> str:
    """The caption without the hint at its end: rules apply to the captioner's words, not to the user's."""
    return re.sub(rf"(?:^|,)\s*{re.escape(hint)}\s*$", "", caption, flags=re.IGNORECASE) if hint else caption


def _phrases(caption: str) -> list[str]:
    return [phrase for phrase in (" ".join(part.split()) for part in caption.split(",")) if phrase]


def tidy(text: str) -> str:
    """The text of a changed phrase, or of several, without the "and" or "with a" that a removed word leaves behind."""
    loose = r"^(?:and|or)\s+|(?:^|\s+)(?:and|or|with|of|a|an|the)$"
    phrases = _phrases(text)
    while (shorter := [re.sub(loose, "", phrase, flags=re.IGNORECASE) for phrase in phrases]) != phrases:
        phrases = _phrases(", ".join(shorter))
    return ", ".join(phrases)
