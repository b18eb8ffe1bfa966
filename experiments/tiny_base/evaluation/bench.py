"""What the parts of an evaluation share: the bundle, fresh drawings, tallies, and where pictures are left."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import mean

from PIL import Image

from experiments.tiny_base import judge
from experiments.tiny_base.avatars import random_avatar, read
from experiments.tiny_base.characters import random_character
from experiments.tiny_base.data import Drawn
from experiments.tiny_base.held_out import HeldOut
from experiments.tiny_base.lessons import write
from experiments.tiny_base.palette import background
from experiments.tiny_base.render import picture
from lora_lab.launch.config import compose

SEED = 2  # of everything drawn here; training's is 1
SIZE = (128, 128)
COLUMNS = 12  # of the pictures to look at


class Bench:
    def __init__(self, bundle: Path, out: Path, avatars: Path, prompts: int):
        self.bundle, self.out, self.prompts = bundle, out, prompts
        self._avatars = read(avatars)

    def config(self, *overrides: str):
        models = {"model.base": "tiny-sdxl", "captioner.base": "tiny-blip", "model.judge": "tiny-clip"}
        return compose("tracker=off", *(f"{key}={self.bundle / name}" for key, name in models.items()), *overrides)

    def drawings(self, avatars: int, characters: int) -> list[Drawn]:
        """Fresh ones, always the same, each on one background."""
        rng = Random(f"{SEED}/drawings")
        lines = self._avatars[:avatars]
        pairs = [random_avatar(line, rng) for line in lines] + [random_character(rng) for _ in range(characters)]
        return [Drawn(svg, look, [background(rng)]) for svg, look in pairs]

    def sheet(self, name: str, pictures: list[Image.Image], columns: int = COLUMNS) -> None:
        rows = -(-len(pictures) // columns)
        sheet = Image.new("RGB", (columns * SIZE[0], rows * SIZE[1]), "white")
        for i, image in enumerate(pictures):
            sheet.paste(image.resize(SIZE), (i % columns * SIZE[0], i // columns * SIZE[1]))
        sheet.save(self.out / f"{name}.png")


def image_of(drawn: Drawn) -> Image.Image:
    return picture(drawn.svg, drawn.backgrounds[0][1])


def tally(readings: Iterable[dict[str, bool]]) -> dict[str, float]:
    """Field by field the share that is right, and of all fields together."""
    fields: dict[str, list[bool]] = defaultdict(list)
    for reading in readings:
        for field, right in reading.items():
            fields[field].append(right)
            if field not in ("background", "kind", "colour"):
                fields["all attributes"].append(right)
    return {field: round(mean(right), 3) for field, right in fields.items()}


def lessons(bench: Bench, character: HeldOut) -> Path:
    """The folder of a held-out character's training set, written if it is not there."""
    folder = bench.out / "lessons" / character.trigger
    if not folder.is_dir():
        write(character, folder)
    return folder


def pictures_in(folder: Path) -> list[Image.Image]:
    return [Image.open(file) for file in sorted(folder.glob("*.png"))]


def spread(groups: Iterable[Sequence[Image.Image]]) -> float:
    """How much the seed changes pictures of one prompt, a group: one minus the intersection over union of two
    silhouettes, mean over all pairs."""
    silhouettes = ([judge.silhouette(image) for image in group] for group in groups)
    return round(1 - mean(judge.overlap(a, b) for group in silhouettes for a, b in combinations(group, 2)), 3)
