"""What a subject wears and how it looks. Of each thing all alternatives are drawn, and compared where they differ."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.tiny_base.characters import NEUTRAL
from experiments.tiny_base.judge.colours import (
    BODY_ENDS,
    COAT_ENDS,
    Tinted,
    difference,
    nearest,
    palette_lab,
    to_tensor,
)
from experiments.tiny_base.judge.cutout import core
from experiments.tiny_base.judge.drawings import (
    WHOLE,
    Frame,
    all_hair,
    all_hats,
    drawing,
    drawn_core,
    in_colour,
    overlap,
    without_pattern,
)
from experiments.tiny_base.judge.pose import Found, warped
from experiments.tiny_base.palette import COATS, HAIRS
from experiments.tiny_base.vocabulary import EYES, FACIAL_HAIR, GLASSES, MOUTHS, Look

LIKELY_HEADS = 3  # of hats, and of hair: those whose silhouettes fit best are looked at in colour
PATTERN = 0.1  # dots cover 0.3 of a body, stripes more

# Of each posture of an arm the middle, as accessories.limbs.Arm.
HANGING = ((11, 16, 13, 3), (17, 11, 10, 1), (4, 16.5, 24.5, 7))
RAISED = ((15.5, -23.5, 14.5, 1), (13.5, -25.5, 13, 2), (17.5, -21.5, 16, 0))


def read(found: Found, look: Look) -> dict[str, object]:
    """Values of fields of Look, when a look was asked for.

    What is read goes into the drawings for what is read next: hair may cover an eye."""
    worn = _with_headwear(found, without_pattern(look))
    worn = replace(worn, shirt=_shirt(found, worn))
    worn = replace(worn, hands=_hands(found, worn))
    values = {name: getattr(worn, name) for name in ("hat", "hair", "shirt", "hands")}
    if without_pattern(look) != look:
        values["mark"] = _pattern(found, worn, look.mark[0])
    elif look.mark:
        values["mark"] = _badge(found, worn)
        worn = replace(worn, mark=values["mark"])
    return values | _face(found, worn)


def has_own(found: Found, look: Look, values: dict[str, object]) -> bool:
    """Whether the elements are seen that always belong to a held-out character, which wears what was read."""
    if not found.subject.own:
        return False
    look = replace(look, **{name: value for name, value in values.items() if name != "eyes"})
    without, with_own = replace(found.subject, own=""), found.subject
    drawings = torch.stack([drawing(subject, found.coat, look) for subject in (without, with_own)])
    return _most_like(found, drawings) == 1


def _drawings(found: Found, looks: list[Look], frame: Frame = WHOLE, place: int = 0) -> Tensor:
    """(B, pixels, pixels, 4)"""
    return torch.stack([drawing(found.subject, found.coat, look, frame, place=place) for look in looks])


def _compare(placed: Tensor, drawn: Tensor) -> Tensor:
    """How far the picture (B or 1, 4, H, W) is from each of several drawings (B, 4, H, W), where these differ: (B,)."""
    unlike = difference(drawn[:, None, :3], drawn[None, :, :3]).amax((0, 1))
    shape = (drawn[:, 3].amax(0) - drawn[:, 3].amin(0)).square()
    where = (unlike + shape).clamp(max=1)
    costs = difference(placed[:, :3], drawn[:, :3]) + (placed[:, 3] - drawn[:, 3]).square()
    return (costs * where).sum((1, 2)) / where.sum().clamp(min=1e-6)


def _most_like(found: Found, drawings: Tensor) -> int:
    """Which of drawings (B, 76, 76, 4) in WHOLE the picture is most like, where they differ."""
    return int(_compare(found.placed, found.cutout.on_ground(drawings)).argmin())


def _with_headwear(found: Found, look: Look) -> Look:
    """The look with the hat or hair that the picture shows."""
    seen_core = core(found.placed[:, 3] > 0.5)[0]
    bare = replace(look, hat=None, hair=None)
    drawings, looks = [_drawings(found, [bare])], [bare]
    for palette, alternatives in ((COATS, all_hats(bare)), (HAIRS, all_hair(bare))):
        # The shapes of most of them are far from the picture's; none is left out that was asked for.
        overlaps = {each: overlap(seen_core, drawn_core(found.subject, each)) for each in alternatives}
        likely = sorted(alternatives, key=overlaps.get, reverse=True)[:LIKELY_HEADS]
        likely += [each for each in alternatives if each not in likely and each == in_colour(look, "gray")]
        dark, light = (_drawings(found, [in_colour(each, end) for each in likely]) for end in ("black", "white"))
        colours, coloured = Tinted(dark, light, (palette["black"], palette["white"])).matched(found.placed, palette)
        drawings.append(coloured)
        looks += [in_colour(each, colour) for each, colour in zip(likely, colours, strict=True)]
    return looks[_most_like(found, torch.cat(drawings))]


def _shirt(found: Found, look: Look) -> str | None:
    without, dark, light = (_drawings(found, [replace(look, shirt=shirt)]) for shirt in (None, "black", "white"))
    (colour,), coloured = Tinted(dark, light, COAT_ENDS).matched(found.placed, COATS)
    return colour if _most_like(found, torch.cat([without, coloured])) else None


def _hands(found: Found, look: Look) -> str | None:
    """Which hands are raised: each half of the picture is compared on its own."""
    drawings = [
        drawing(found.subject, found.coat, replace(look, hands=hands), pose=replace(NEUTRAL, **{field: (arm, arm)}))
        for hands, field, arms in ((None, "hanging", HANGING), ("both", "raised", RAISED))
        for arm in arms
    ]
    drawn = found.cutout.on_ground(torch.stack(drawings))
    middle = round((64 - WHOLE.left) / WHOLE.width * WHOLE.pixels)
    right, left = (
        int(_compare(found.placed[..., half], drawn[..., half]).argmin()) >= len(HANGING)
        for half in (slice(None, middle), slice(middle, None))
    )
    if right and left:
        return "both"
    return "right" if right else "left" if left else None


def _badge(found: Found, look: Look) -> tuple[str, str] | None:
    """A mark that has a place: which, and its colour."""
    marks = [(kind, 0) for kind in ("bow tie", "scarf")]
    marks += [(kind, place) for kind in ("flower", "heart", "star") for place in range(4)]
    without = _drawings(found, [replace(look, mark=None)])
    dark, light = (
        torch.cat([_drawings(found, [replace(look, mark=(kind, colour))], place=place) for kind, place in marks])
        for colour in ("black", "white")
    )
    colours, coloured = Tinted(dark, light, COAT_ENDS).matched(found.placed, COATS)
    best = _most_like(found, torch.cat([without, coloured]))
    return (marks[best - 1][0], colours[best - 1]) if best else None


def _pattern(found: Found, plain: Look, kind: str) -> tuple[str, str] | None:
    """Dots or stripes, as asked, in the commonest foreign colour, if it covers enough of the plain body and shirt."""
    bare = Tinted(*(drawing(found.subject, colour, plain) for colour in BODY_ENDS), BODY_ENDS).pure()
    expected = {nearest(to_tensor(found.coat), COATS)}
    if plain.shirt:
        shirts = _drawings(found, [replace(plain, shirt=shirt) for shirt in ("black", "white")])
        bare |= Tinted(*shirts, COAT_ENDS).pure()
        expected.add(plain.shirt)
    distances = difference(found.placed[:, :3], palette_lab(COATS)[:, :, None, None])
    close, names = distances.min(0)
    counts = torch.bincount(names[bare & (close < 0.3)], minlength=len(COATS)) / bare.sum().clamp(min=1)
    shares = {name: float(count) for name, count in zip(COATS, counts, strict=True) if name not in expected}
    colour = max(shares, key=shares.get)
    return (kind, colour) if shares[colour] > PATTERN else None


def _face(found: Found, look: Look) -> dict[str, object]:
    x, y, scale = found.subject.body.face
    frame = Frame(x - 36 * scale, y - 30 * scale, 72 * scale, 72)
    rows, columns = slice(14, 58), slice(12, 60)  # of a frame, in which eyes and mouth are
    placed = _soft(warped(found.cutout.layers, found.pose, frame, margin=7)[0])

    def drawn(looks: list[Look]) -> Tensor:
        return _soft(found.cutout.on_ground(_drawings(found, looks, frame)))

    def window(left: int, top: int) -> Tensor:
        return placed[:, top : top + frame.pixels, left : left + frame.pixels]

    # Faces look aside, by as much as gazes of poses do. 7, 7 is straight ahead.
    expected = drawn([look])[0, :3, rows, columns]
    unlike = {
        (left, top): float(difference(window(left, top)[:3, rows, columns], expected).mean())
        for left in range(1, 14)
        for top in range(3, 12)
    }
    left, top = min(unlike, key=unlike.get)
    near = [window(left + i, top + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]

    def best(name: str, values: list) -> object:
        alternatives = drawn([replace(look, **{name: value}) for value in values])
        costs = torch.stack([_compare(window[None], alternatives) for window in near])
        return values[int(costs.amin(0).argmin())]

    fields = {"glasses": [None, *GLASSES], "facial_hair": [None, *FACIAL_HAIR]}
    if look.glasses != "sun":
        fields["eyes"] = list(EYES)
    if look.mouth:
        fields["mouth"] = list(MOUTHS)
    if look.cheeks:
        fields["cheeks"] = [False, True]
    for _ in range(2):  # what was asked for and is not there makes the first readings uncertain
        before = look
        for name, values in fields.items():
            look = replace(look, **{name: best(name, values)})
        if look == before:
            break
    values = {name: getattr(look, name) for name in fields}
    if look.glasses == "sun" and "eyes" in values:
        values["eyes"] = None  # hidden
    return values


def _soft(layers: Tensor) -> Tensor:
    """Layers (..., C, H, W) a little blurred, so that a line half a pixel away is still near."""
    taps = torch.tensor([0.25, 0.5, 0.25])
    kernel = (taps[:, None] * taps).expand(layers.shape[-3], 1, 3, 3)
    return F.conv2d(layers, kernel, padding=1, groups=layers.shape[-3])
