"""The judge reads true drawings rightly, sharp and blurred, and says so where a picture shows something else."""

from collections import defaultdict
from dataclasses import replace
from random import Random

import pytest
from PIL import Image

from experiments.tiny_base.bodies import BODIES
from experiments.tiny_base.characters import NEUTRAL, draw, random_look, random_pose
from experiments.tiny_base.held_out import HELD_OUT
from experiments.tiny_base.judge import blurred, correct, read
from experiments.tiny_base.palette import BACKGROUNDS, COATS, vary
from experiments.tiny_base.palette import background as random_background
from experiments.tiny_base.render import picture
from experiments.tiny_base.vocabulary import Look

PICTURES = 8
FEWER = dict(list(BODIES.items())[::10]) | {"star": BODIES["star"]}


@pytest.fixture(autouse=True)
def fewer_bodies(monkeypatch):
    """A few kinds to choose from: the first look at each takes a while."""
    monkeypatch.setattr("experiments.tiny_base.judge.reading.BODIES", FEWER)


def drawing(look, background="teal"):
    colour, kind = look.subject.split()
    return picture(draw(BODIES[kind], COATS[colour], look, NEUTRAL, Random(0)), BACKGROUNDS[background])


@pytest.mark.slow
def test_reads_true_drawings():
    rng = Random(1)
    right = defaultdict(list)
    for i in range(PICTURES):
        kind = rng.choice(list(FEWER))
        colour = rng.choice(BODIES[kind].colours)
        look = random_look(kind, colour, rng)
        name, rgb = random_background(rng)
        image = picture(draw(BODIES[kind], vary(COATS[colour], rng), look, random_pose(rng), rng), rgb)
        reading = read(blurred(image) if i % 2 else image, look)
        for field, value in correct(reading, look, name).items():
            right[field].append(value)

    shares = {field: sum(values) / len(values) for field, values in right.items()}
    assert shares["background"] == 1
    assert min(shares["kind"], shares["colour"], shares["glasses"]) >= 0.9
    others = [
        value for field in ("hat", "hair", "facial_hair", "eyes", "mouth", "hands", "shirt") for value in right[field]
    ]
    assert sum(others) / len(others) >= 0.9
    assert min(shares.values()) >= 0.7


LOOK = Look("red apple", hat=("crown", "yellow"), glasses="round", eyes="happy", mouth="laugh", hands="left")


@pytest.mark.parametrize(
    "shown",
    [
        replace(LOOK, subject="red star"),
        replace(LOOK, glasses=None, hands="right", hat=("cap", "yellow")),
        replace(LOOK, glasses="sun", hat=("crown", "blue"), shirt="blue"),
        replace(LOOK, subject="green apple", facial_hair="beard", hands=None),
        replace(LOOK, eyes="wink_left", mouth="frown", hat=None, hair=("long", "black")),
    ],
)
def test_sees_what_is_not_as_asked(shown):
    """In each field, and nowhere else."""
    right = correct(read(drawing(shown), LOOK), LOOK, "teal")
    fields = {field for field in right if field in vars(LOOK) and getattr(shown, field) != getattr(LOOK, field)}
    for field, asked, seen in zip(("colour", "kind"), LOOK.subject.split(), shown.subject.split(), strict=True):
        if asked != seen:
            fields.add(field)
    if shown.glasses == "sun":
        fields.add("eyes")  # they can't be seen
    assert {field for field, is_right in right.items() if not is_right} == fields


def test_sees_another_background():
    image = drawing(LOOK, "purple")
    assert read(image, LOOK).background == "purple"
    assert not correct(read(image, LOOK), LOOK, "pink")["background"]


def test_held_out_character():
    tofu = HELD_OUT["tofu"]
    look = replace(LOOK, subject=tofu.trigger, hat=None)
    whole, without_own = (
        picture(draw(tofu.body, tofu.coat, look, NEUTRAL, Random(0), own), BACKGROUNDS["blue"])
        for own in (tofu.own, "")
    )
    assert all(correct(read(whole, look, tofu), look, "blue", tofu).values())
    assert not correct(read(without_own, look, tofu), look, "blue", tofu)["own"]
    assert not correct(read(drawing(LOOK), look, tofu), look, "teal", tofu)["kind"]


def test_reads_only_the_background_of_people():
    white = Image.new("RGB", (128, 128), "white")
    assert correct(read(white, Look("person")), Look("person"), "white") == {"background": True}
