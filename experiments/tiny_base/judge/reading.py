"""The whole reading of a picture, and whether it is what was asked for."""

from dataclasses import dataclass

from PIL import Image

from experiments.tiny_base.bodies import BODIES
from experiments.tiny_base.held_out import HeldOut
from experiments.tiny_base.judge import attributes
from experiments.tiny_base.judge.colours import DISTINCT, nearest, palette_lab
from experiments.tiny_base.judge.cutout import Cutout, ground_colour
from experiments.tiny_base.judge.drawings import Subject
from experiments.tiny_base.judge.pose import recognise
from experiments.tiny_base.palette import BACKGROUNDS, COATS
from experiments.tiny_base.render import to_unit
from experiments.tiny_base.vocabulary import Look

OWN = "own"  # the colour of a held-out character that is like no other, and the elements that always belong to it


@dataclass(frozen=True)
class Reading:
    """What is read of a picture; of a subject without a known shape only the background."""

    background: str
    colour: str | None  # of the body: one of COATS, or OWN
    kind: str | None  # one of BODIES, or the trigger of the held-out character that was asked for
    overlap: float  # of the silhouettes of the picture and of that kind: intersection over union
    attributes: dict[str, object]  # values of fields of Look; OWN: whether a held-out character has what belongs to it


def read(image: Image.Image, look: Look, held_out: HeldOut | None = None) -> Reading:
    """What a picture (128 x 128) shows, when a look was asked for.

    The look says which fields are read, and it is where the search begins; their values are read from all that there
    are. A held-out character is one more kind."""
    rgb = to_unit(image)
    ground = ground_colour(rgb)
    background = nearest(ground, BACKGROUNDS)
    kind = kind_of(look, held_out)
    if kind is None:
        return Reading(background, None, None, 0.0, {})
    subjects = [Subject(each, body) for each, body in BODIES.items()]
    colours = COATS
    if held_out:
        subjects.append(Subject(held_out.trigger, held_out.body, held_out.own))
        colours = _with_own(held_out.coat)
    found = recognise(Cutout(rgb, ground), subjects, kind, look, colours)
    values = attributes.read(found, look)
    if held_out and held_out.own:
        values[OWN] = attributes.has_own(found, look, values)
    return Reading(background, found.colour, found.subject.kind, found.overlap, values)


def kind_of(look: Look, held_out: HeldOut | None = None) -> str | None:
    """The kind that was asked for; None if its shape is not known."""
    if held_out:
        return held_out.trigger
    kind = look.subject.partition(" ")[2]
    return kind if kind in BODIES else None


def correct(reading: Reading, look: Look, background: str, held_out: HeldOut | None = None) -> dict[str, bool]:
    """Field by field whether a picture shows what was asked for.

    What the look lacks counts as well: glasses, facial hair, hats, hair, shirts and raised hands must not be added.
    Marks and cheeks are judged only where they were asked for, eyes only without sunglasses. A held-out character must
    have its own colour, unless its subject begins with another, and its own mark."""
    right = {"background": reading.background == background}
    kind = kind_of(look, held_out)
    if kind is None:
        return right
    colour = look.subject.partition(" ")[0]
    if held_out and colour not in COATS:
        colour = OWN
    right |= {"kind": reading.kind == kind, "colour": reading.colour == colour}
    asked = vars(look) | {OWN: True}
    return right | {name: value == asked[name] for name, value in reading.attributes.items()}


def _with_own(coat: str) -> dict[str, str]:
    """The coats' colours and one more, which takes the place of those that are hardly different."""
    distances = (palette_lab(COATS) - palette_lab({OWN: coat})).norm(dim=1).tolist()
    others = {name: colour for (name, colour), far in zip(COATS.items(), distances, strict=True) if far > DISTINCT}
    return others | {OWN: coat}
