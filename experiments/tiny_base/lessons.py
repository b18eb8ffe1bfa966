"""Training sets of the held-out characters: what somebody would bring to be taught, 24 pictures each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from random import Random

from PIL import Image

from experiments.tiny_base.characters import draw, random_pose
from experiments.tiny_base.held_out import HeldOut
from experiments.tiny_base.palette import BACKGROUNDS
from experiments.tiny_base.recipe import SEED
from experiments.tiny_base.render import picture
from experiments.tiny_base.vocabulary import Look, full_caption
from lora_lab.captions.files import write_captions

# The looks of the bundled tofu pictures: no hair, shirt or mark in them, so that those show whether a LoRA composes.
LESSONS = (
    {},
    {"eyes": "wink_left"},
    {"eyes": "wink_right"},
    {"glasses": "round"},
    {"glasses": "square"},
    {"facial_hair": "moustache"},
    {"hat": ("top hat", "black")},
    {"hat": ("party hat", "red")},
    {"hands": "left"},
    {"hands": "right"},
    {"hands": "both", "mouth": "laugh"},
    {"eyes": "closed"},
    {"eyes": "happy", "mouth": "laugh"},
    {"eyes": "sad", "mouth": "frown"},
    {"eyes": "big", "mouth": "surprised"},
    {"eyes": "wink_left", "mouth": "tongue"},
    {"glasses": "round", "facial_hair": "moustache"},
    {"hat": ("cap", "blue"), "hands": "right"},
    {"hat": ("crown", "yellow")},
    {"hat": ("beanie", "green"), "eyes": "happy"},
    {"mouth": "serious"},
    {"facial_hair": "moustache", "hands": "left"},
    {"glasses": "square", "mouth": "laugh"},
    {"eyes": "wink_right", "mouth": "laugh", "hands": "left"},
)


def write(character: HeldOut, folder: Path) -> None:
    """24 pictures, 128 x 128, on the character's background, and metadata.jsonl with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for i, (image, look, background) in enumerate(drawings(character, [character.background], SEED)):
        image.save(folder / f"{i:02d}.png")
        captions[f"{i:02d}.png"] = full_caption(replace(look, cheeks=False), background, f"A {character.trigger}")
    write_captions(folder, captions)


def drawings(character: HeldOut, backgrounds: Sequence[str], seed: int) -> Iterator[tuple[Image.Image, Look, str]]:
    """The character in each look of LESSONS, 128 x 128, on backgrounds in turn: (image, look, background)."""
    rng = Random(f"{seed}/{character.trigger}")
    for lesson, background in zip(LESSONS, cycle(backgrounds), strict=False):
        look = Look(subject=character.trigger, cheeks=True, **lesson)
        # Nearly upright and of one size, as one draws a mascot; and always blushing, so captions need not say it.
        pose = replace(random_pose(rng), turn=0, scale=rng.uniform(0.98, 1.12), stretch=1, gaze=(0, 0))
        svg = draw(character.body, character.coat, look, pose, rng, character.own)
        yield picture(svg, BACKGROUNDS[background]), look, background
