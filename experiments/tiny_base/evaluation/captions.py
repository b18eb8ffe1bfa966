"""What the captioner says of pictures of which everything is known."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import mean

import torch
from torch import Tensor

from experiments.tiny_base.augment import worn as spoilt
from experiments.tiny_base.avatars import random_avatar, read
from experiments.tiny_base.data import Drawn
from experiments.tiny_base.evaluation.bench import SEED, Bench, image_of
from experiments.tiny_base.palette import background
from experiments.tiny_base.render import to_image, to_pixels
from experiments.tiny_base.vocabulary import full_caption, meanings, parted
from lora_lab.captions.blip import load_blip


def captions(bench: Bench, unseen: Path | None) -> dict:
    """The captioner on fresh pictures, whole and spoilt, and on avatars of a style that it never saw."""
    captioner = load_blip(
        str(bench.bundle / "tiny-blip"), torch.device("cpu"), prompt=None, max_tokens=60, beams=4, batch_size=20
    )

    def score(drawings: list[Drawn], change: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        right: dict[str, list[bool]] = defaultdict(list)
        pixels = torch.stack([to_pixels(image_of(drawn)) for drawn in drawings])
        images = [to_image(x) for some in pixels.split(20) for x in change(some)]
        for drawn, text in zip(drawings, captioner.caption(images), strict=True):
            compare(text.split(", "), drawn, right)
        return {name: round(mean(values), 3) for name, values in right.items()}

    torch.manual_seed(SEED)
    figures = {
        "avatars": score(bench.drawings(120, 0)),
        "characters": score(bench.drawings(0, 120)),
        "spoilt": score(bench.drawings(60, 60), spoilt),
    }
    if unseen:
        rng = Random(f"{SEED}/unseen")
        figures["unseen style"] = score(
            [Drawn(*random_avatar(line, rng), [background(rng)]) for line in read(unseen)[:120]]
        )
    return figures


def compare(said: list[str], drawn: Drawn, right: dict[str, list[bool]]) -> None:
    """Add to `right` what a caption's phrases say truly of a drawing; glasses also where there are none."""
    look, ground = drawn.look, drawn.backgrounds[0][0]
    whole = full_caption(look, ground).split(", ")
    subject, background = parted(said[0])
    right["subject"].append(subject == parted(whole[0])[0])
    right["background"].append(background == ground)
    right["exact"].append(said == whole)
    right["wears glasses or not"].append(any("glasses" in phrase for phrase in said) == bool(look.glasses))
    if look.hair:
        right["hair's colour"].append(any(f" {look.hair[1]}" in phrase for phrase in said[1:]))
    for phrase in whole[1:]:
        field, _ = meanings()[phrase]
        right[field].append(phrase in said)
