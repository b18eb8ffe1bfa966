"""What is wrong with the words of captions and prompts: the syntax of other programs, too many tokens, no trigger."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from lora_lab.console import cut
from lora_lab.images.dataset import list_names
from lora_lab.settings.sections import WINDOWS, Triggers

# A text is read word for word. Every expression takes time in proportion to the text.
SYNTAX = (
    (r"(?:^|(?<=\s))--[a-z]{1,4}(?:\s+[\d.]+)?(?=\s|$)",
     "an option of other programs and only words here: set its key, such as model.resolution or sampler.steps"),
    (r"\[(?:trigger|name|filewords|class|subject)\]",
     "not replaced: write {trigger} in a prompt, and the trigger itself in a caption"),
    (r"<(?:lora|lyco|hypernet|embedding):[^<>]{1,200}>", "only words here: a LoRA is attached by lora="),
    (r"\([^()\\]{1,200}:\s?\d{0,3}(?:\.\d{0,4})?\)", "only words here: parentheses and numbers weight nothing"),
    (r"\{[^{}|]{0,200}\|[^{}]{0,200}\}|\|\|\|", "only words here: nothing is chosen from"),
    (r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]+", "control characters: delete them"),
)  # fmt: skip
COMPILED = tuple((re.compile(pattern, re.IGNORECASE), meaning) for pattern, meaning in SYNTAX)

# By the first word of Unicode's names of letters; CLIP was trained on English.
LANGUAGES = {
    "HANGUL": "Korean", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "CJK": "Chinese", "CYRILLIC": "Cyrillic",
    "GREEK": "Greek", "ARABIC": "Arabic", "HEBREW": "Hebrew", "THAI": "Thai", "DEVANAGARI": "Hindi",
}  # fmt: skip

MOST = 3  # texts of which each has its own line
Texts = Mapping[str, Sequence[str]]  # by the name of an image, or by a key of the configuration
CountTokens = Callable[[str], int]  # start and end markers included


def syntax_warnings(texts: Texts) -> list[str]:
    """A line for each kind of syntax of other programs in the texts, with an example."""
    warnings = []
    for pattern, meaning in COMPILED:
        found = {name: match[0] for name, own in texts.items() for text in own if (match := pattern.search(text))}
        if found:
            warnings.append(f"{list_names(list(found))}: {cut(next(iter(found.values())), 40)} is {meaning}")
    return warnings


def long_texts(texts: Texts, count_tokens: CountTokens, window: int) -> dict[str, int]:
    """Name -> tokens of each text that has more than `window`: its end is not read."""
    tokens = {name: max(map(count_tokens, own), default=0) for name, own in texts.items()}
    return {name: count for name, count in tokens.items() if count > window}


def length_warnings(tokens: Mapping[str, int], window: int, of: str = "", about: str = "") -> list[str]:
    """The lines about `long_texts`: one each for three of them, and one for all others."""
    names, lines = list(tokens), []
    for name in names[:MOST]:
        count = tokens[name]
        longer = next((f" or set text.max_tokens={limit}" for limit, size in WINDOWS.items() if size >= count), "")
        lines.append(f"{of}{name} is {about}{count} tokens: CLIP reads {window}, so shorten it{longer}")
    if len(names) > MOST:
        lines.append(f"{len(names) - MOST} more are over {window} tokens: {list_names(names[MOST:])}")
    return lines


def without_trigger(texts: Texts, *triggers: str) -> list[str]:
    """The names of texts that have none of the triggers as a whole word."""
    whole = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, triggers))})(?!\w)")
    return [name for name, own in texts.items() if not all(map(whole.search, own))]


def prompts_by_key(**groups: Sequence[str]) -> dict[str, str]:
    """Prompts by where they stand in the configuration: stage_prompts=["a"] gives {"stage.prompts[0]": "a"}."""
    named = {group.replace("_", ".", 1): prompts for group, prompts in groups.items()}
    return {f"{key}[{i}]": text for key, prompts in named.items() for i, text in enumerate(prompts)}


def prompt_warnings(
    prompts: Mapping[str, str],
    triggers: Triggers,
    count_tokens: CountTokens | None,
    window: int,
    of_character: bool = True,
) -> list[str]:
    """The lines about prompts by their keys, in which {trigger} is replaced; those `of_character` should have one.

    Of a prompt `window` tokens are read. Without `count_tokens` tokens are estimated."""
    texts = {key: triggers.fill([text]) for key, text in prompts.items()}
    about, count = ("", count_tokens) if count_tokens else ("about ", estimate_tokens)
    warnings = syntax_warnings(texts)
    warnings += length_warnings(long_texts(texts, count, window), window, about=about)
    if of_character and (names := without_trigger(texts, *triggers.all)):
        warnings.append(f"{list_names(names)}: without the trigger, write {{trigger}} where the character is meant")
    return warnings


def estimate_tokens(text: str) -> int:
    """About the number of CLIP's tokens, start and end markers included: one for a word of up to eight letters, for a
    digit and for punctuation; in scripts other than Latin letters have one or more each."""
    return 2 + len(re.findall(r"[A-Za-z]{1,8}|\d|[^\w\s]{1,8}|[^\W\d_A-Za-z]|_", text[:4000]))


def foreign_texts(texts: Texts, trigger: str) -> dict[str, str]:
    """Name -> the language of each text that, besides the trigger, has letters of a script of its own.

    Which language Latin letters are is not told."""
    found = {
        name: sorted({language for text in own for language in languages_of(text.replace(trigger, ""))})
        for name, own in texts.items()
    }
    return {name: " and ".join(names) for name, names in found.items() if names}


def languages_of(text: str) -> set[str]:
    """The languages whose own scripts the text has letters of; none for Latin letters."""
    scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in set(text)}
    languages = {LANGUAGES[script] for script in scripts if script in LANGUAGES}
    return languages - {"Chinese"} if languages & {"Japanese", "Korean"} else languages
