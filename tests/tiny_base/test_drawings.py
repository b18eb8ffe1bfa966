"""What is drawn is what the vocabulary can say, whole, and the same for the same seed."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.tiny_base.avatars import random_avatar, read
from experiments.tiny_base.bodies import BODIES
from experiments.tiny_base.characters import NEUTRAL, draw, random_character
from experiments.tiny_base.details import random_details
from experiments.tiny_base.held_out import HELD_OUT
from experiments.tiny_base.lessons import write
from experiments.tiny_base.palette import BACKGROUNDS, COATS, HAIRS, SKINS, to_rgb, vary
from experiments.tiny_base.render import composite, picture, rasterize
from experiments.tiny_base.shapes import document
from experiments.tiny_base.vocabulary import (
    EYES,
    FACIAL_HAIR,
    GLASSES,
    HAIR,
    HANDS,
    HATS,
    MARKS,
    MOUTHS,
    Look,
    full_caption,
)
from lora_lab.images.dataset import read_dataset

AVATARS = Path(__file__).with_name("avatars.jsonl.xz")
PLAIN = Look("yellow lemon")
VALUES = [
    *({"eyes": value} for value in EYES),
    *({"mouth": value} for value in MOUTHS),
    *({"glasses": value} for value in GLASSES),
    *({"facial_hair": value} for value in FACIAL_HAIR),
    *({"hair": (value, "purple")} for value in HAIR),
    *({"hat": (value, "blue")} for value in HATS),
    *({"mark": (value, "red")} for value in MARKS),
    *({"hands": value} for value in HANDS),
    {"shirt": "green"},
    {"cheeks": True},
]


def lemon(look):
    return rasterize(draw(BODIES["lemon"], COATS["yellow"], look, NEUTRAL, Random(0))).astype(int)


def test_no_two_things_that_can_be_said_look_alike():
    drawn = [(value, lemon(replace(PLAIN, **value))) for value in VALUES]
    drawn = [(value, pixels) for value, pixels in drawn if value not in ({"eyes": "open"}, {"mouth": "smile"})]
    drawn.append(("plain", lemon(PLAIN)))
    for i, (one, pixels) in enumerate(drawn):
        for other, others in drawn[:i]:
            differing = (np.abs(pixels - others).max(-1) > 60).sum()
            assert differing >= 10, f"{one} and {other} differ in {differing} pixels"


def test_a_raised_left_hand_is_on_the_viewers_right():
    left, right = (lemon(replace(PLAIN, hands=hand))[:50, :, 3] > 0 for hand in ("left", "right"))
    assert left[:, 90:].sum() > right[:, 90:].sum() + 40
    assert right[:, :38].sum() > left[:, :38].sum() + 40


def test_characters_stand_whole_in_the_picture():
    rng = Random(3)
    for _ in range(60):
        svg, look = random_character(rng)
        alpha = rasterize(svg)[..., 3]
        border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert border.max() == 0, full_caption(look, "teal")


def test_one_seed_draws_one_character():
    assert random_character(Random(4)) == random_character(Random(4))
    assert random_character(Random(4)) != random_character(Random(5))


@pytest.mark.parametrize(("ground", "rim"), [("black", True), ("white", False), ("brown", False)])
def test_only_on_black_a_subject_gets_a_light_rim(ground, rim):
    subject = np.zeros((1, 32, 32, 4), np.uint8)
    subject[:, 10:20, 10:20, 3] = 255  # black itself
    rgb = composite(torch.from_numpy(subject), torch.tensor([BACKGROUNDS[ground]], dtype=torch.uint8))
    beside, far = (rgb[0, :, 15, x].mean().item() for x in (8, 2))
    assert (beside > far + 0.5) == rim
    assert rgb[0, :, 15, 15].max() == -1


def test_details_are_opaque_and_full_of_colours():
    pixels = rasterize(random_details(Random(6)))
    assert pixels[..., 3].min() == 255
    assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 50


def test_held_out_characters_are_no_kind_of_the_data():
    assert not {"tofu", "block", "cube", "box", "mug", "cup", "octopus"} & set(BODIES)
    kinds = np.stack([shape(body) for body in BODIES.values()])
    for name, character in HELD_OUT.items():
        mine = shape(character.body)
        overlap = (kinds & mine).sum((1, 2)) / (kinds | mine).sum((1, 2))
        assert overlap.max() < 0.95, f"{name} has the outline of {list(BODIES)[overlap.argmax()]}"


def shape(body):
    return rasterize(document(body.paint("#808080")))[..., 3] > 128


@pytest.mark.parametrize("name", HELD_OUT)
def test_lessons_are_a_dataset_that_lora_lab_reads(name, tmp_path):
    character = HELD_OUT[name]
    write(character, tmp_path)
    dataset = read_dataset(tmp_path)
    assert len(dataset) == 24
    for caption in (caption for example in dataset for caption in example.captions):
        assert caption.startswith(f"A {character.trigger} with a") and f"{character.background} background" in caption
        assert "hair" not in caption and "shirt" not in caption
    pixels = np.asarray(Image.open(tmp_path / "00.png")).reshape(-1, 3)
    near = np.abs(pixels.astype(int) - to_rgb(character.coat)).max(1) < 12
    assert near.mean() > 0.1, "its own colour is seen"


def test_avatars_are_told_in_the_shared_vocabulary():
    allowed = {
        "skin": {None, *SKINS},
        "glasses": {None, *GLASSES},
        "facial_hair": {None, *FACIAL_HAIR},
        "eyes": set(EYES),
        "mouth": {None, *MOUTHS},
        "shirt": {None, *COATS},
    }
    lines = read(AVATARS)
    styles = set()
    for line in lines:
        svg, look = random_avatar(line, Random(7))
        for field, values in allowed.items():
            assert getattr(look, field) in values
        assert look.hair is None or (look.hair[0] in HAIR and look.hair[1] in HAIRS)
        assert look.hat is None or look.hat[0] in HATS
        assert look.mark is None and look.hands is None
        styles.add(look.style or look.subject.split()[-1])
        assert (np.asarray(picture(svg, BACKGROUNDS["teal"])) != BACKGROUNDS["teal"]).any()
    assert styles == {"flat", "big-head", "inked", "toon", "mini", "doodle", "emoji"}


def test_a_varied_colour_stays_near():
    rng = Random(8)
    for name, colour in COATS.items():
        assert max(abs(a - b) for a, b in zip(to_rgb(vary(colour, rng)), to_rgb(colour), strict=True)) <= 8, name
