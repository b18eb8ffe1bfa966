"""Words of captions and prompts that do nothing here are named, each kind in one line, in linear time."""

import pytest

from lora_lab.captions.syntax import (
    estimate_tokens,
    long_texts,
    prompt_warnings,
    prompts_by_key,
    syntax_warnings,
    without_trigger,
)
from lora_lab.settings.schema import Triggers

TOFU = Triggers({"": "HANA_TOFU"})

FOREIGN = {
    "a cat --w 256": "'--w 256'", "--n bad hands, a cat": "'--n'", "a [trigger] waving": "'[trigger]'",
    "[filewords], a cat": "'[filewords]'", "a cat <lora:my_cat:0.8>": "'<lora:my_cat:0.8>'",
    "a (big:1.3) cat": "'(big:1.3)'",
    "a {red|blue} cat": "'{red|blue}'", "a cat ||| a dog": "'|||'",
    "a \x1b[31mred cat": r"'\x1b'", "a\x08 cat": r"'\x08'",
}  # fmt: skip
PLAIN = [
    "a cat, a dog", r"hana tofu \(series\), :d, ^_^, >_<, ;)", "a well-lit -- really -- room", "a (big) cat, at 10:30",
    "A {trigger} [closeup]", "ratio 16:9", "{one}", "a | b", "눈 속의 고양이 🙂", "a\u200dcat\u2028", "(a: cat)",
]  # fmt: skip


@pytest.mark.parametrize(("text", "example"), FOREIGN.items())
def test_the_syntax_of_other_programs_is_named_in_captions_and_prompts_alike(text, example):
    (line,) = syntax_warnings({"1.png": ("a cat",), "2.png": ("a cat", text), "3.png": (text,)})
    assert line.startswith(f"2.png, 3.png: {example} is ") and "\n" not in line and "\x1b" not in line
    assert prompt_warnings({"stage.prompts[1]": text}, Triggers({"": "cat"}), len, 77, of_character=False) == [
        line.replace("2.png, 3.png", "stage.prompts[1]")
    ]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_words_are_not(text):
    assert syntax_warnings({"1.png": (text,)}) == []


def test_prompts_are_named_by_their_keys_and_without_the_trigger_and_with_too_many_tokens():
    prompts = prompts_by_key(stage_prompts=["A {trigger} waving", "a ghost", "A HANA_TOFU, " + "red hat, " * 40])
    assert prompt_warnings(prompts, TOFU, None, 77) == [
        "stage.prompts[2] is about 127 tokens: CLIP reads 77, so shorten it or set text.max_tokens=150",
        "stage.prompts[1]: without the trigger, write {trigger} where the character is meant",
    ]
    count = {"a ghost": 78}.get
    assert prompt_warnings(prompts, TOFU, lambda text: count(text, 77), 77, of_character=False) == [
        "stage.prompts[1] is 78 tokens: CLIP reads 77, so shorten it or set text.max_tokens=150"
    ]
    assert list(prompts_by_key(score_prompts=["a"], score_other_prompts=["b"])) == [
        "score.prompts[0]", "score.other_prompts[0]",
    ]  # fmt: skip


@pytest.mark.parametrize("piece", ["a", "a ", "(", "(a:", "{a|", "<lora:", "--w ", "1", "(a:1", "[", "\x1b", "|", "。"])
def test_a_caption_of_a_megabyte_is_read_like_any_other(piece):
    text = piece * (10**6 // len(piece))  # a quadratic expression takes minutes
    assert all(len(line) < 300 for line in syntax_warnings({"1.png": (text,)}))
    assert without_trigger({"1.png": (text,)}, "HANA_TOFU") == ["1.png"]
    assert long_texts({"1.png": (text,)}, estimate_tokens, 77) or piece == "\x1b"
