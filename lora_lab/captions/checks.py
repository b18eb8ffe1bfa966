"""What a person would reject in a caption that a language model has rewritten: pure functions of texts."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import snowballstemmer

from lora_lab.captions.phrases import COLOURS
from lora_lab.captions.rules import FUNCTION_WORDS, trigger_pattern
from lora_lab.captions.syntax import languages_of

# Words that name nothing: a rewritten caption may have them though the old one had others in their place.
NEUTRAL = frozenset(
    f"{FUNCTION_WORDS}|am|be|been|being|can|do|does|he|she|him|they|them|this|these|those|there|here|not|no|so|too|"
    "very|both|each|all|one|some|any|against|along|around|across|upon|within|also|just|only|wear|wearing|stand|"
    "standing|shown|seen|visible|look|looking|appear|appearing|feature|featuring|display|displaying|"
    "background|side|front|top|part|set|place|position|positioned".split("|")
) - {"smiles", "holds", "waves", "rides"}
REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i can(?:'t|not)|cannot (?:assist|help|comply)|as an? (?:ai|language)|"
    r"sorry,|i apologi[sz]e)",
    re.IGNORECASE,
)
MARKUP = re.compile(r"```|\*\*|__|^\s*(?:[#>*-]|\d+[.)])\s|</?\w+>|\[[^\]]*\]\(|[{}]|\\n", re.MULTILINE)
MOST = 6  # words that an objection names


def objections(
    caption: str,
    source: str,
    hint: str,
    trigger: str,
    *,
    class_noun: str = "",
    max_words: int,
    new_words: int = 0,
    min_kept: float = 0.5,
) -> list[str]:
    """What is wrong with `caption`, made of `source` and of what the user wrote of the image; [] for nothing.

    `new_words` of it may be in neither, but no colour. Of each phrase of `source`, the text between two commas,
    `min_kept` of the words that name something must be in it, but for those that only name the subject. A hint in
    another language must be translated, and its translation has words that are in neither."""
    text = trigger_pattern(trigger).sub(" ", caption)
    count = len(re.findall(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption))
    found = [
        not caption.strip() and "it is empty",
        bool(caption.strip()) and count != 1 and f"it has {trigger} {count} times, not once",
        count == 1 and len(trigger_pattern(trigger).findall(caption)) > 1 and f"it spells {trigger} in another way too",
        (number := len(caption.split())) > max_words and f"it has {number} words, more than {max_words}",
        REFUSAL.search(caption) and "it refuses",
        MARKUP.search(text) and "it has markup",
    ]
    if spoken := sorted(languages_of(text)):
        found.append(f"it has {' and '.join(spoken)} letters")
    foreign = bool(languages_of(hint))
    appeared = words_from_nowhere(caption, trigger, source, hint, class_noun)
    colours = [word for word in appeared if word in COLOURS]
    allowed = new_words + (2 * len(hint.split()) + 1 if foreign else 0)  # English needs more words than most languages
    if len(appeared) > allowed or (colours and not foreign):
        found.append(f"words from nowhere: {_listed(colours if len(appeared) <= allowed else appeared)}")
    if lost := words_from_nowhere("" if foreign else hint, trigger, caption):
        found.append(f"the hint's words are missing: {_listed(lost)}")
    if foreign and not words_from_nowhere(caption, trigger, source, class_noun):
        found.append("the hint is not in it")
    lost = []
    for phrase in _without_subject(source, trigger).split(","):
        missing = words_from_nowhere(phrase, trigger, caption)
        if len(missing) > (1 - min_kept) * len(words_from_nowhere(phrase, trigger)):
            lost += missing
    if lost:
        found.append(f"words are missing: {_listed(dict.fromkeys(lost))}")
    before = _pairs(f"{source}, {hint}", trigger)
    if repeated := [pair for pair, times in _pairs(caption, trigger).items() if times > max(before[pair], 1)]:
        found.append(f"it repeats {_listed(repeated)}")
    return [reason for reason in found if reason]


def words_from_nowhere(text: str, trigger: str, *known: str) -> list[str]:
    """The words of `text`, in order, each once, that name something and are in none of the texts `known`, whatever
    their ending: "wearing" is "wears".

    >>> words_from_nowhere("A HANA_TOFU wearing a red hat, smiling", "HANA_TOFU", "a tofu with a hat that smiles")
    ['red']
    """
    stems = set(map(_stem, _words(" ".join(known), trigger)))
    return [word for word in dict.fromkeys(_words(text, trigger)) if word not in NEUTRAL and _stem(word) not in stems]


def _without_subject(text: str, trigger: str) -> str:
    """The text without its first noun and the adjectives of that, which the trigger replaces.

    >>> _without_subject("HANA_TOFU, a small white blob with a red hat", "HANA_TOFU")
    'with a red hat'
    """
    text = trigger_pattern(trigger).sub(" ", text).strip(" ,")
    subject = re.match(rf"(?:(?:a|an|the)\b\s*)?(?:(?!(?:{FUNCTION_WORDS}|\w+ing)\b)[\w'-]+\s*)*", text, re.IGNORECASE)
    return text[subject.end() :].strip(" ,")


def _pairs(text: str, trigger: str) -> Counter[str]:
    """How often each pair of words that name something stands in the text, whatever is between them."""
    words = [word for word in _words(text, trigger) if word not in NEUTRAL]
    return Counter(f"{first} {second}" for first, second in pairwise(words))


def _words(text: str, trigger: str) -> list[str]:
    """Lower-case words of Latin letters and digits, without the trigger."""
    return re.findall(r"[^\W_]+(?:'[a-z]+)?", trigger_pattern(trigger).sub(" ", text).lower().replace("’", "'"))


def _stem(word: str) -> str:
    word = {"grey": "gray", "golden": "gold"}.get(word, word).removesuffix("'s")
    return snowballstemmer.stemmer("english").stemWord(word)


def _listed(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:MOST]) + (f" and {len(words) - MOST} more" if len(words) > MOST else "")
