"""What the captioner says of pictures of which everything is known."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean

import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipProcessor

from experiments.tiny_base.augment import worn as spoilt
from experiments.tiny_base.avatars import random_avatar, read
from experiments.tiny_base.data import Drawn
from experiments.tiny_base.evaluation.bench import SEED, Bench, image_of, tensor
from experiments.tiny_base.palette import background
from experiments.tiny_base.render import to_image
from experiments.tiny_base.vocabulary import Look, full_caption, phrases
from lora_lab.captions.captioner import clean_decoding

# Fields of a Look and what of a caption belongs to them.
PARTS = {
    "hair": lambda look: replace(EMPTY, hair=look.hair),
    "hat": lambda look: replace(EMPTY, hat=look.hat),
    "glasses": lambda look: replace(EMPTY, glasses=look.glasses),
    "facial hair": lambda look: replace(EMPTY, facial_hair=look.facial_hair),
    "eyes": lambda look: replace(EMPTY, eyes=look.eyes, glasses=None) if look.glasses != "sun" else EMPTY,
    "mouth": lambda look: replace(EMPTY, mouth=look.mouth),
    "shirt": lambda look: replace(EMPTY, shirt=look.shirt),
    "mark": lambda look: replace(EMPTY, mark=look.mark),
    "hands": lambda look: replace(EMPTY, hands=look.hands),
}
EMPTY = Look("", mouth=None)


def captions(bench: Bench, unseen: Path | None) -> dict:
    """The captioner on fresh pictures, whole and spoilt, and on avatars of a style that it never saw."""
    processor = BlipProcessor.from_pretrained(bench.bundle / "tiny-blip", backend="pil")
    blip = BlipForConditionalGeneration.from_pretrained(bench.bundle / "tiny-blip", dtype=torch.float32).eval()

    def score(drawings: list[Drawn], change: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        right: dict[str, list[bool]] = defaultdict(list)
        for some in (drawings[i : i + 20] for i in range(0, len(drawings), 20)):
            images = [to_image(x) for x in change(torch.stack([tensor(image_of(drawn)) for drawn in some]))]
            with torch.inference_mode():
                ids = blip.generate(**processor(images=images, return_tensors="pt"), max_new_tokens=60, num_beams=1)
            for drawn, text in zip(some, processor.batch_decode(ids, skip_special_tokens=True), strict=True):
                compare(clean_decoding(text).split(", "), drawn, right)
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
    subject, _, where = said[0].rpartition(" with a")
    right["subject"].append(subject == whole[0].rpartition(" with a")[0])
    right["background"].append(where.removeprefix("n ").strip() == f"{ground} background")
    right["exact"].append(said == whole)
    right["wears glasses or not"].append(any("glasses" in phrase for phrase in said) == bool(look.glasses))
    if look.hair:
        right["hair's colour"].append(any(f" {look.hair[1]}" in phrase for phrase in said[1:]))
    for name, part in PARTS.items():
        for phrase in phrases(part(look)):
            right[name].append(phrase in said)
