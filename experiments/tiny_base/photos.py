"""What the demo's eight photos show, and how much of it a picture drawn from one keeps.

The photos are DiceBear's avatars, drawn with options that lie beside them in options.jsonl; the looks follow from
those. Pictures are read by judge/, which has learnt nothing and is not the captioner."""

import json
from dataclasses import dataclass, replace
from random import Random

from PIL import Image

from experiments.tiny_base import judge
from experiments.tiny_base.avatars import STYLES
from experiments.tiny_base.characters import NEUTRAL, draw
from experiments.tiny_base.held_out import HeldOut
from experiments.tiny_base.judge.colours import nearest, to_tensor
from experiments.tiny_base.palette import BACKGROUNDS, COATS, HAIRS, SKINS
from experiments.tiny_base.render import picture
from experiments.tiny_base.vocabulary import Look
from lora_lab import demo

COLOURS = {  # options that have a colour, and the names that it may have
    "hairColor": HAIRS,
    "skinColor": SKINS,
    "baseColor": SKINS,
    "shirtColor": COATS,
    "clothesColor": COATS,
    "clothingColor": COATS,
    "bodyColor": COATS,
}
OPTIONAL = ("glasses", "facialHair", "accessories", "mustache", "blushes", "beard", "rearHair")  # absent: None
ALIKE = ({"red", "ginger"}, {"white", "gray"})  # colours of hair that are not told apart
MOODS = ({"smile", "laugh", "teeth"}, {"frown", "serious"}, {"surprised"})  # nor mouths of one mood
TOFU_LIKE = 0.75  # of the silhouettes, intersection over union; a person's is below


@dataclass(frozen=True)
class Photo:
    file: str
    background: str
    look: Look


def photos() -> list[Photo]:
    """The bundled photos in the order of their names."""
    rows = [json.loads(line) for line in (demo.PHOTOS / "options.jsonl").read_text().splitlines()]
    return [Photo(row["file_name"], row["background"], _look(row["style"], row["options"])) for row in rows]


def _look(style: str, options: dict) -> Look:
    """The look of an avatar with DiceBear's `options`, each a list of one value."""
    values = {key: (value[0] if value else None) for key, value in options.items() if isinstance(value, list)}
    values = dict.fromkeys(OPTIONAL) | values
    if values["accessories"] == "sunglasses":
        values["eyes"] = "normal"  # hidden
    for key, palette in COLOURS.items():
        if values.get(key):
            values[key] = nearest(to_tensor(f"#{values[key]}"), palette)
    (name,) = (each for each in STYLES if each.replace("-", "") == style.lower())
    return STYLES[name].describe(values)


def drawing(photo: Photo, character: HeldOut) -> Image.Image:
    """The character with all that the photo has: what a perfect picture would be, and how well that is read."""
    svg = draw(character.body, character.coat, photo.look, NEUTRAL, Random(0), character.own)
    return picture(svg, BACKGROUNDS[photo.background])


@dataclass(frozen=True)
class Likeness:
    """What one picture shows of the character and of the photo."""

    kind: bool  # the character's body
    colour: bool  # in the character's colour
    own: bool  # with what always belongs to the character
    kept: dict[str, bool]  # attributes that the photo has

    @property
    def character(self) -> float:
        return (self.kind + self.colour + self.own) / 3

    @property
    def share(self) -> float:
        """Of the photo's attributes those that are kept."""
        return sum(self.kept.values()) / len(self.kept)


def likeness(image: Image.Image, photo: Photo, character: HeldOut) -> Likeness:
    """Read a picture (128 x 128) that was drawn from `photo`.

    Of glasses and facial hair it counts that there are some, of hair and shirt the colour, of the mouth the mood. Only
    what the photo has counts, without a stubble, which is hardly seen; what is added does not. A character without
    anything that is its own has all of it."""
    truth = photo.look
    asked = replace(truth, subject=character.trigger, style=None, skin=None)
    reading = judge.read(image, asked, character)
    seen = reading.attributes
    kept = {"background": reading.background == photo.background}
    if truth.hair:
        kept["hair"] = bool(seen["hair"]) and _same(seen["hair"][1], truth.hair[1], ALIKE)
    else:
        kept["hair"] = seen["hair"] is None
    for field in ("glasses", "facial_hair"):
        if getattr(truth, field) not in (None, "stubble"):
            kept[field] = seen[field] is not None
    if truth.shirt:
        kept["shirt"] = seen["shirt"] == truth.shirt
    if truth.mouth:
        kept["mouth"] = _same(seen["mouth"], truth.mouth, MOODS)
    return Likeness(
        kind=reading.kind == character.trigger and reading.overlap > TOFU_LIKE,
        colour=reading.colour == judge.OWN,
        own=bool(seen.get(judge.OWN, True)),
        kept=kept,
    )


def _same(one: str | None, other: str, groups: tuple[set[str], ...]) -> bool:
    return one == other or any({one, other} <= group for group in groups)
