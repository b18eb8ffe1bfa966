"""refiner.strip: phrases leave whole sentences behind, hints and triggers stay, and doing it again changes nothing."""

import doctest
from collections.abc import Sequence

import pytest

from lora_lab.captions import strip
from lora_lab.captions.refiner import StrippingRefiner, load_refiner, strip_setting
from lora_lab.captions.rules import Rule, compile_rules
from lora_lab.captions.strip import strip_phrases
from lora_lab.errors import InputError

RED = ["red body"]


@pytest.mark.parametrize(
    ("caption", "phrases", "expected"),
    [
        ("A T with a red body and a hat", RED, "A T with a hat"),
        ("A T with a hat and a red body", RED, "A T with a hat"),
        ("A T with a red body", RED, "A T"),
        ("A T with a red body in the snow", RED, "A T in the snow"),
        ("A T with a hat and a red body in the snow", RED, "A T with a hat in the snow"),
        ("A T with a hat, a red body and a bow", RED, "A T with a hat, a bow"),
        ("A T with a hat and a red body and a bow", RED, "A T with a hat and a bow"),
        ("A T waving with a red body and smiling", RED, "A T waving and smiling"),
        ("A T with a red body and in the snow", RED, "A T in the snow"),
        ("A T that has a Red  Body and a hat", RED, "A T that has a hat"),
        ("A T with a red body, with a hat", RED, "A T with a hat"),
        ("A T stands in the snow. It has a red body. It waves.", RED, "A T stands in the snow. It waves."),
        ("A T (with a red body), waving", RED, "A T, waving"),
        ("with a red body", RED, "T"),
        ("An T with a big red body suit", RED, "A T with a big suit"),
        ("A T with a red hat body", ["hat", "red body"], "A T"),
        ("A T made of red bricks, in front of a wall", ["red bricks", "wall"], "A T"),
        ("A T next to a wall and a tree", ["wall"], "A T next to a tree"),
        ("Its red body is shiny, T waves", RED, "T waves"),
        ("The red body is on a T", RED, "is on a T"),
        ("A T with a redder body", RED, "A T with a redder body"),
        ("T, red body, one eye, hat", ["one eye", "red body"], "T, hat"),
        ("A T with a red body and one round eye", ["one round eye", "red body"], "A T"),
        ("A T with a red body and one round eye, waving", ["body", "eye"], "A T, waving"),
        ("A T wearing a red scarf and smiling", ["wearing a red scarf"], "A T smiling"),
        ("A T wearing a red scarf and a hat", ["wearing a red scarf"], "A T wearing a hat"),
        ("A red orange hat on a red T", ["red"], "An orange hat on a T"),
        ("A T is smiling in the snow", ["smiling"], "A T in the snow"),
        ("A T smiling and waving", ["smiling"], "A T waving"),
        ("A T raising both hands, smiling", ["both hands"], "A T, smiling"),
        ("T, a cartoon white ghost with a hat", ["cartoon white ghost"], "T, with a hat"),
        ("빨간 모자를 쓴 T, 웃음", ["빨간 모자를 쓴"], "T, 웃음"),
        ("a t  , untouched ,as it is", RED, "a t  , untouched ,as it is"),
    ],
)
def test_what_is_left_is_a_sentence_and_stripping_it_changes_nothing(caption, phrases, expected):
    assert strip_phrases(caption, phrases, "T") == expected
    assert strip_phrases(expected, phrases, "T") == expected


@pytest.mark.parametrize(
    ("caption", "hint", "expected"),
    [
        ("A T with a red body, in the snow", "in the snow", "A T, in the snow"),
        ("A T with a red body, with a red body in the sun", "with a red body in the sun", None),
        ("A T whose red body glows in the sun", "a red body in the sun", None),
    ],
)
def test_the_users_hint_stays(caption, hint, expected):
    assert strip_phrases(caption, ["red body", "in the snow"] if expected is None else RED, "T", hint) == (
        expected or caption
    )


def test_a_hint_that_is_one_of_the_phrases_is_never_stripped():
    assert (
        strip_phrases("A T in the snow, in the snow", ["in the snow"], "T", "in the snow")
        == "A T in the snow, in the snow"
    )


class ForeignRefiner:
    """Of another package: it knows nothing of `strip`, and adds what it likes."""

    def __init__(self, word: str) -> None:
        self.word = word

    def refine(self, captions: Sequence[str], hints: Sequence[str], trigger: str) -> list[str]:
        texts = [c if trigger in c else f"{trigger}, {c}" for c in captions]
        texts = [t if self.word in t else f"{t}, {self.word}" for t in texts]
        return [t if h in t else f"{t}, {h}" for t, h in zip(texts, hints, strict=True)]


def test_every_refiner_is_stripped_and_refining_again_changes_nothing():
    settings = {"_target_": f"{__name__}.ForeignRefiner", "word": "shiny", "strip": ["a red body", "shiny"]}
    repeats = compile_rules(replace=[Rule("^seen$", "with a red body")])
    for refiner in (load_refiner(settings), StrippingRefiner(repeats, tuple(RED))):
        raw, hints = ["with a hat, with a red body and a hat, seen", "a red body"], ["", "holding a red body"]
        refined = refiner.refine(raw, hints, "T")
        assert refined == ["T, with a hat", "T, a red body, holding a red body"] or "red body" not in refined[0]
        assert refined[1].endswith("holding a red body")
        assert refiner.refine(refined, hints, "T") == refined


@pytest.mark.parametrize(
    ("value", "words"), [("blue", "write auto or a list"), ([1, "with a"], "with a"), (["a, b"], "a, b"), ([""], "''")]
)
def test_wrong_phrases_are_refused_by_name(value, words):
    with pytest.raises(InputError, match=r"refiner\.strip") as caught:
        strip_setting({"strip": value})
    assert words in str(caught.value)
    assert strip_setting({"strip": "auto"}) == "auto" and strip_setting({}) == []


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(strip).failed == 0
