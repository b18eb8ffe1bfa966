"""The training set: drawn once into a folder of arrays, then kept whole on the device.

A picture is a subject with alpha and a few backgrounds, each with its captions: the colours are put together when
a batch is made, which costs less than keeping every combination.
"""

import multiprocessing
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from experiments.tiny_base import tokenizers
from experiments.tiny_base.avatars import random_avatar, read
from experiments.tiny_base.characters import random_character
from experiments.tiny_base.details import random_details
from experiments.tiny_base.palette import background
from experiments.tiny_base.recipe import BACKGROUNDS_EACH, PIXELS, SEED, Recipe
from experiments.tiny_base.render import composite, rasterize
from experiments.tiny_base.vocabulary import Look, altered, free_caption, full_caption

# The four captions of a picture on a background, as indices.
FREE = (0, 1)  # two ways somebody might write it
FULL = 2  # everything that can be said
WRONG = 3  # the full one with one thing told wrongly

HELD_OUT = 100  # every so-manieth picture is for tests only
TOKENIZER_SAMPLE = 10_000


@dataclass(frozen=True)
class Drawn:
    """A subject's SVG, its look, and `BACKGROUNDS_EACH` backgrounds as (name, rgb)."""

    svg: str
    look: Look
    backgrounds: list[tuple[str, tuple[int, int, int]]]


def draw(index: int, avatar: str | None) -> tuple[Drawn, Random]:
    """Picture `index` of the set, and the generator to write its captions with; `avatar` is a line of DiceBear's."""
    rng = Random(f"{SEED}/{index}")
    svg, look = random_avatar(avatar, rng) if avatar else random_character(rng)
    return Drawn(svg, look, [background(rng) for _ in range(BACKGROUNDS_EACH)]), rng


def captions(drawn: Drawn, rng: Random) -> list[list[str]]:
    """Four captions a background: two free, the full one, and a wrong one."""
    return [
        [
            free_caption(drawn.look, name, rng),
            free_caption(drawn.look, name, rng),
            full_caption(drawn.look, name),
            full_caption(*altered(drawn.look, name, rng)),
        ]
        for name, _ in drawn.backgrounds
    ]


def prepare(folder: Path, recipe: Recipe, avatars: Path) -> None:
    """Learn the tokenizers and draw everything into `folder`; what is there is not done again."""
    if (folder / "subjects.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = read(avatars)[: recipe.avatars]
    described = [*lines, *[None] * recipe.characters]
    if not (folder / "tokenizers").is_dir():  # a bundle's were unpacked there
        step = max(1, len(described) // TOKENIZER_SAMPLE)
        with multiprocessing.Pool(os.cpu_count()) as pool:
            sample = pool.starmap(_written, list(enumerate(described))[::step], chunksize=64)
        free, full = zip(*sample, strict=True)
        learnt = tokenizers.train_clip(list(chain(*free))), tokenizers.train_blip(list(full))
        tokenizers.save(folder / "tokenizers", *learnt)
    clip, blip = tokenizers.load(folder / "tokenizers")

    total = len(described) + recipe.details
    shapes = {
        "pictures": ((total, PIXELS, PIXELS, 4), np.uint8),
        "backgrounds": ((total, BACKGROUNDS_EACH, 3), np.uint8),
        "clip": ((len(described), BACKGROUNDS_EACH, 4, clip.model_max_length), np.int16),
        "blip": ((len(described), BACKGROUNDS_EACH, blip.model_max_length), np.int16),
    }
    for name, (shape, dtype) in shapes.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape).flush()
    jobs = [*enumerate(described), *((i, None) for i in range(len(described), total))]
    with multiprocessing.Pool(os.cpu_count(), _open, (folder, len(described))) as pool:
        subjects = pool.starmap(_fill, jobs, chunksize=64)
    names = {name: i for i, name in enumerate(dict.fromkeys(subjects))}
    np.save(folder / "subjects.npy", np.array([names[subject] for subject in subjects[: len(described)]], np.int32))


def _written(index: int, avatar: str | None) -> tuple[list[str], str]:
    drawn, rng = draw(index, avatar)
    written = captions(drawn, rng)[0]
    return [written[i] for i in FREE], written[FULL]


def _open(folder: Path, described: int) -> None:
    global _arrays, _tokenizers, _described
    _arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("pictures", "backgrounds", "clip", "blip")
    }
    _tokenizers, _described = tokenizers.load(folder / "tokenizers"), described


def _fill(index: int, avatar: str | None) -> str:
    """Draw one picture into the arrays; returns what it shows, by which pictures of one subject are found."""
    if index >= _described:
        rng = Random(f"{SEED}/{index}")
        _arrays["pictures"][index] = rasterize(random_details(rng))
        _arrays["backgrounds"][index] = [background(rng)[1] for _ in range(BACKGROUNDS_EACH)]
        return ""
    drawn, rng = draw(index, avatar)
    written = captions(drawn, rng)
    clip, blip = _tokenizers
    _arrays["pictures"][index] = rasterize(drawn.svg)
    _arrays["backgrounds"][index] = [rgb for _, rgb in drawn.backgrounds]
    for k, four in enumerate(written):
        _arrays["clip"][index, k] = clip(four, padding="max_length", truncation=True).input_ids
        ids = blip(four[FULL], padding="max_length", truncation=True).input_ids
        _arrays["blip"][index, k] = [blip.bos_token_id, *ids[1:]]  # BLIP decodes from its own first token
    # Avatars are all "person" and no two of them the same one.
    return f"avatar {index}" if avatar else drawn.look.subject


class Pictures:
    """The arrays on a device. Indices (B,) name pictures, `ground` (B,) which of their backgrounds."""

    def __init__(self, folder: Path, device: str):
        def load(name: str) -> Tensor:
            return torch.from_numpy(np.load(folder / f"{name}.npy")).to(device)

        self.device = device
        self.pixels, self.backgrounds = load("pictures"), load("backgrounds")
        self.clip, self.blip, self.subjects = load("clip"), load("blip"), load("subjects").long()
        described = torch.arange(len(self.subjects), device=device)  # pictures of details come behind, without captions
        tests = described % HELD_OUT == HELD_OUT - 1
        self.training, self.tests = described[~tests], described[tests]
        self._everything = torch.cat([self.training, torch.arange(len(described), len(self.pixels), device=device)])
        # Pictures in the order of their subjects, and for each where its subject begins and how many it has.
        self._by_subject = torch.argsort(self.subjects, stable=True)
        counts = torch.bincount(self.subjects)
        self._first, self._count = (counts.cumsum(0) - counts)[self.subjects], counts[self.subjects]

    def draw(self, size: int, details: bool = False) -> tuple[Tensor, Tensor]:
        """A random batch for training: indices and backgrounds; pictures of details only if asked for."""
        among = self._everything if details else self.training
        index = among[torch.randint(len(among), (size,), device=self.device)]
        return index, torch.randint(BACKGROUNDS_EACH, (size,), device=self.device)

    def test(self, size: int) -> tuple[Tensor, Tensor]:
        """Held-out pictures, evenly from avatars and characters, each on its first background."""
        index = self.tests[
            torch.linspace(0, len(self.tests) - 1, min(size, len(self.tests)), device=self.device).long()
        ]
        return index, torch.zeros_like(index)

    def rgb(self, index: Tensor, ground: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        return composite(self.pixels[index], self.backgrounds[index, ground])

    def partner(self, index: Tensor) -> Tensor:
        """For each picture another of the same subject, dressed otherwise; an avatar's is itself."""
        chance = torch.rand(len(index), device=self.device)
        return self._by_subject[self._first[index] + (chance * self._count[index]).long()]
