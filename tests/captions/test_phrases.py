"""The identity lint: what most captions say of the character is found, what varies is not."""

import doctest
import random

import pytest

from lora_lab.captions import phrases
from lora_lab.captions.files import read_captions
from lora_lab.captions.phrases import constant_attributes, is_background, repeated_captions, shared_phrases
from lora_lab.captions.syntax import foreign_texts
from lora_lab.demo import TOFU


def made_up(seed, pattern, planted, missing=0, count=20):
    """Captions of pictures that vary in background, clothes and pose, `planted` in all of them but `missing`."""
    choice = random.Random(seed).choice
    return [
        pattern.format(
            planted if i >= missing else "a smile",
            choice(["green", "blue", "white", "pink", "beige", "black"]),
            choice(
                ["wearing a red cap", "with round glasses", "wearing a blue scarf", "with its eyes closed", "winking"]
            ),
            choice(["waving", "laughing", "in the snow", "looking up", "sitting on a chair"]),
        )
        for i in range(count)
    ]


DATASETS = [
    (
        made_up(1, "A T with {} with a {} background, {}, {}", "a red body and one round eye"),
        "red body and one round eye",
    ),
    (made_up(2, "T, {}, {} background, {}, {}", "two long ears", missing=4), "two long ears"),
    (made_up(3, "A T {}, {}, on a {} background, {}", "with a pink flower on its head")[:9], "pink flower on its head"),
    (made_up(4, "T, a small {} in front of a {} wall, {}, {}", "wooden puppet"), "small wooden puppet"),
    (made_up(5, "There is a T character that has {}. The wall is {}. It is {}, {}.", "a white Beard"), "white beard"),
]


@pytest.mark.parametrize(("captions", "planted"), DATASETS)
def test_the_planted_phrase_is_found_with_its_count_and_nothing_else_of_the_character(captions, planted):
    found = {p: n for p, n in shared_phrases(captions, "T", "character").items() if not is_background(p)}
    assert found.pop(planted) == sum(planted in caption.casefold() for caption in captions) >= 0.8 * len(captions)
    assert found == {}
    assert constant_attributes(captions, "T", "character") == {}


def test_the_bundled_captions_have_only_their_background_in_common():
    captions = list(read_captions(TOFU).values())
    assert shared_phrases(captions, "HANA_TOFU", "character") == {"purple background": 24}
    assert constant_attributes(captions, "HANA_TOFU", "character") == {}
    assert repeated_captions({name: [text] for name, text in read_captions(TOFU).items()}, ["HANA_TOFU"]) == []


@pytest.mark.parametrize(
    ("captions", "found"),
    [
        (["A T with a red hat, smiling", "T with a red hat", "T in a red hat, a red hat"], {"red hat": 3}),
        (["T, on grass, smiling", "smiling T on grass", "on grass T smiling"], {"grass": 3, "smiling": 3}),
        (["T with a hat", "T with a scarf", "T with a bag"], {}),
        (["a hat T", "hat", "hats"], {}),
        (["red, hat T"] * 3, {"red": 3, "hat": 3}),
        (["T smiling", "T smiling"], {}),
        (["빨간 모자를 쓴 T", "T, 빨간 모자를 쓴", "빨간 모자를 쓴 T, 웃음"], {"빨간 모자를 쓴": 3}),
        (["T with red ears, red ears tall"] * 4 + ["T with red ears"], {"red ears": 5, "red ears tall": 4}),
        (["T with sad eyes", "T with big eyes", "T with angry eyes"], {}),
        (["T in a blue hat", "T with a blue scarf", "T on a blue chair"], {}),
        (["T with a green background", "T, a blue background", "T on a backdrop"], {}),
    ],
)
def test_only_the_longest_phrases_are_listed_and_none_that_varies(captions, found):
    assert shared_phrases(captions, "T") == found


def test_a_noun_that_always_has_one_colour_is_found_though_few_captions_mention_it():
    captions = ["T with a red body, waving"] * 5 + ["T with a shiny red body"] * 4 + ["T, smiling"] * 7
    assert constant_attributes(captions, "T") == {"red body": 9}
    assert constant_attributes([*captions, "T with a blue body"], "T") == {}
    assert constant_attributes([*captions, *["T"] * 3], "T") == {}, "in less than half of the captions"
    assert constant_attributes(["T, blue background"] * 6 + ["T"] * 4, "T") == {}


def test_equal_captions_are_grouped_unless_they_are_the_trigger_alone():
    captions = {"a": ["T, smiling"], "b": ["t,  Smiling"], "c": ["T"], "d": ["A T"], "e": ["T"], "f": ["T, winking"]}
    assert repeated_captions(captions, ["T"]) == [["a", "b"]]


def test_captions_in_another_script_are_named_with_its_language():
    texts = {"a": ["T, 웃음"], "b": ["두부 waving"], "c": ["T, ein Lächeln"], "d": ["T 微笑", "T в шляпе"]}
    assert foreign_texts(texts, "두부") == {"a": "Korean", "d": "Chinese and Cyrillic"}


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(phrases).failed == 0
