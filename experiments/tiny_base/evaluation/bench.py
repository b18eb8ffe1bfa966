"""What the parts of an evaluation share: the bundle, fresh drawings, tallies, and where pictures are left."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from random import Random
from statistics import mean

import torch
from PIL import Image
from torch import Tensor

from experiments.tiny_base.avatars import random_avatar, read
from experiments.tiny_base.characters import random_character
from experiments.tiny_base.data import Drawn
from experiments.tiny_base.held_out import HeldOut
from experiments.tiny_base.lessons import write
from experiments.tiny_base.palette import background
from experiments.tiny_base.render import picture
from lora_lab.config import compose

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


def tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


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


def lesson(bench: Bench, character: HeldOut) -> list[Image.Image]:
    folder = bench.out / "lessons" / character.trigger
    if not folder.is_dir():
        write(character, folder)
    return [Image.open(file) for file in sorted(folder.glob("*.png"))]
