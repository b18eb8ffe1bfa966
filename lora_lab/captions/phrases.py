"""Phrases that all captions share: what they describe becomes part of the trigger."""

import re
from collections.abc import Sequence
from itertools import islice

MOST_WORDS = 77  # of a caption that are compared; with commas
STOPWORDS = {"a", "an", "the", "and", "or", "of", "in", "on", "at", "with", "its", "it", "is", "to", "by", "for"}


def common_phrases(captions: Sequence[str], trigger: str) -> list[str]:
    """The longest runs of words in every caption, without the trigger and without articles only; [] below 3 captions.

    ["A HANA_TOFU with a red hat, smiling", "HANA_TOFU with a red hat", "HANA_TOFU in a red hat"] share ["red hat"]."""
    if len(captions) < 3:
        return []
    texts = [_words(caption, trigger) for caption in captions]
    joined = [f" {' '.join(words)} " for words in texts]
    words, phrases, start = texts[0], [], 0
    while start < len(words):
        end = start
        while end < len(words) and words[end] != "," and _in_all(words[start : end + 1], joined):
            end += 1
        phrase = _without_stopwords(words[start:end])
        if phrase:
            phrases.append(" ".join(phrase))
        start = max(end, start + 1)
    return list(dict.fromkeys(phrases))


def _in_all(run: Sequence[str], texts: Sequence[str]) -> bool:
    return all(f" {' '.join(run)} " in text for text in texts)


def _words(caption: str, trigger: str) -> list[str]:
    """Lower-case words, and the commas that separate phrases; the trigger separates phrases too.

    They are the first 77: comparing all runs of a megabyte would take minutes."""
    text = re.sub(r"[.;:!?]", ",", caption.replace(trigger, ",")).lower()
    return [match[0] for match in islice(re.finditer(r"[\w'-]+|,", text), MOST_WORDS)]


def _without_stopwords(words: list[str]) -> list[str]:
    """The run without the stopwords at its ends."""
    places = [i for i, word in enumerate(words) if word not in STOPWORDS]
    return words[places[0] : places[-1] + 1] if places else []
