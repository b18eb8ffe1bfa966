"""Phrases taken out of captions, so that the trigger stands for what they say, and the sentences left whole."""

import re
from collections.abc import Sequence

from lora_lab.captions.phrases import ATTRIBUTES, LEADING
from lora_lab.captions.rules import FUNCTION_WORDS, MARK, PARTICIPLE, agree_article, tidy, trigger_pattern
from lora_lab.errors import InputError

HINT = "\ue001"  # stands for the user's hint while a caption is changed, as MARK does for the trigger
DETERMINER = "a|an|the|its|his|her|their|this|that|one|two|three|both|some"
# Words that an object follows.
GOVERNOR = (
    "with|without|in|on|of|at|by|for|from|to|into|onto|over|under|above|below|behind|beside|near|against|between|"
    "inside|outside|through|as|like|is|are|was|has|have|having|had|wears|wearing|holds|holding|carrying|showing|"
    "featuring|raising|sticking out|next to|close to|in front of|on top of|made of|covered in|covered with|dressed in"
)
_DETERMINER = re.compile(rf"(?:^|(?<=\()|\s)(?:{DETERMINER})$", re.IGNORECASE)
_ADJECTIVES = re.compile(rf"(?:(?:^|\s)(?:{'|'.join(sorted(ATTRIBUTES))}))+$", re.IGNORECASE)
_PARTICIPLE = re.compile(rf"{PARTICIPLE}(?!\w)", re.IGNORECASE)
_GOVERNED = re.compile(rf"(?:^|(?<=\()|\s)(?:{GOVERNOR})$", re.IGNORECASE)
_LINK = re.compile(r"(?:^|\s)(?:and|or)$", re.IGNORECASE)
_NOUN = re.compile(rf"(?!(?:{FUNCTION_WORDS}|{GOVERNOR}|{PARTICIPLE})(?!\w))[\w{MARK}]", re.IGNORECASE)
_OBJECT = re.compile(rf"(?:{DETERMINER})\s+\w|{_NOUN.pattern}", re.IGNORECASE)


def phrase_pattern(phrase: str) -> re.Pattern:
    """Matches the phrase as whole words in any case; its group is the phrase without words such as "with a" around it.

    Raises InputError for a phrase that has only such words, or punctuation within."""
    words = phrase.strip(" ,.").split()
    places = [i for i, word in enumerate(words) if word.casefold() not in LEADING]
    if not places or any(re.search(r"[,.;:!?]", word) for word in words):
        raise InputError(f"refiner.strip: {phrase!r} is no phrase of a caption: name words between two commas")
    lead, core, tail = words[: places[0]], words[places[0] : places[-1] + 1], words[places[-1] + 1 :]
    parts = [r"\s+".join(map(re.escape, part)) for part in (lead, core, tail)]
    before, after = parts[0] and parts[0] + r"\s+", parts[2] and r"\s+" + parts[2]
    return re.compile(rf"(?<![\w'-]){before}({parts[1]}){after}(?![\w'-])", re.IGNORECASE)


def strip_phrases(caption: str, phrases: Sequence[str], trigger: str, hint: str = "") -> str:
    """The caption without the phrases, and without what only led to them.

    >>> strip_phrases("A TOFU with a red body and a hat, smiling", ["red body"], "TOFU")
    'A TOFU with a hat, smiling'

    The trigger and the user's hint stay, and so does a phrase that is in the hint."""
    patterns = [phrase_pattern(phrase) for phrase in sorted(phrases, key=len, reverse=True)]
    patterns = [pattern for pattern in patterns if not pattern.search(hint)]
    own = re.compile(rf"(?<!\w){re.escape(hint)}(?!\w)", re.IGNORECASE) if hint else None
    found = [*own.finditer(caption)] if own else []
    text = caption[: found[-1].start()] + HINT + caption[found[-1].end() :] if found else caption
    text = trigger_pattern(trigger).sub(MARK, text)
    parts = re.split(r"(\s*[,.;:!?]+(?:\s+|$))", text)  # phrases, and what is between them
    stripped = [_without(part, patterns) for part in parts[::2]]
    if stripped == parts[::2]:
        return caption
    text = stripped[0]
    for between, old, new in zip(parts[1::2], parts[2::2], stripped[1:], strict=True):
        named = text.endswith(MARK) and text != parts[0] and new.startswith("with ")  # A T [...], with a hat
        text += (" " if named else between) * bool(text and (new or not old)) + new
    text = text.replace(MARK, trigger).replace(HINT, found[-1][0] if found else "")
    return agree_article(text, trigger) or trigger


def _without(text: str, patterns: Sequence[re.Pattern]) -> str:
    """The text between two punctuation marks without what the patterns' groups match."""
    while found := next((match for pattern in patterns if (match := pattern.search(text))), None):
        text = _joined(text[: found.start(1)].strip(), found[1], text[found.end(1) :].strip())
        text = tidy(re.sub(r"\s*\(\s*\)|^(?:it|he|she|they)$", "", text, flags=re.IGNORECASE))
    return text


def _joined(before: str, phrase: str, after: str) -> str:
    """The text before and after the phrase, without what cannot stand without it."""
    if _NOUN.match(after):  # the phrase was an adjective
        return f"{_agreed(before, after)} {after}".strip()
    head = before if _PARTICIPLE.match(phrase) else _ADJECTIVES.sub("", before)
    head = _DETERMINER.sub("", head)
    link = re.match(r"(?:and|or)\s+", after, re.IGNORECASE)
    rest = after[link.end() :] if link else after
    if link and _GOVERNED.search(head) and _OBJECT.match(rest):  # "with" of "with a red body and a hat"
        return f"{head} {rest}"
    while _GOVERNED.search(head):
        head = _GOVERNED.sub("", head)
    if _LINK.search(head):
        head = head if link else _LINK.sub("", head)
    elif link and _PARTICIPLE.match(rest) and _PARTICIPLE.match(head.rpartition(" ")[2]):  # "waving and smiling"
        rest = after
    if not head and not {MARK, HINT} & {*rest} and re.match(r"(?:is|are|was|were|has|have)\s", rest, re.IGNORECASE):
        return ""  # what the phrase was or had
    return f"{head} {rest}".strip()


def _agreed(before: str, noun: str) -> str:
    """`before`, its article at the end as `noun` wants it."""
    vowel = re.match(r"(?!eu|uni|us[aeiou]|one)[aeiou]", noun, re.IGNORECASE)
    return re.sub(r"\b(a)n?$", r"\1n" if vowel else r"\1", before, flags=re.IGNORECASE)
