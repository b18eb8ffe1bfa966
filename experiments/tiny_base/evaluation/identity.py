"""What the small CLIP can tell apart."""

from collections import defaultdict
from collections.abc import Callable
from random import Random

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from experiments.tiny_base.characters import random_character
from experiments.tiny_base.evaluation.bench import SEED, Bench, image_of, lessons, pictures_in
from experiments.tiny_base.held_out import HELD_OUT
from experiments.tiny_base.palette import background
from experiments.tiny_base.render import picture
from experiments.tiny_base.vocabulary import altered, full_caption
from lora_lab.evaluation.embedders import embed


@torch.inference_mode()
def clip(bench: Bench, size: int = 256) -> dict:
    """Which of 256 captions a picture has; a caption against one with a single lie; which picture shows one subject."""
    folder = bench.bundle / "tiny-clip"
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    settings = bench.config("stage=train").model
    rng = Random(f"{SEED}/clip")

    def see(pictures: list[Image.Image]) -> Tensor:
        return embed(settings, pictures, [], torch.device("cpu")).clip

    def understand(texts: list[str]) -> Tensor:
        tokens = processor(text=texts, return_tensors="pt", padding="max_length", truncation=True)
        return torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)

    drawings = bench.drawings(size // 2, size - size // 2)
    told = [(drawn.look, drawn.backgrounds[0][0]) for drawn in drawings]
    pictures, texts = see([image_of(drawn) for drawn in drawings]), understand([full_caption(*each) for each in told])
    lies = understand([full_caption(*altered(*each, rng)) for each in told])
    taught = {name: see(pictures_in(lessons(bench, character))) for name, character in HELD_OUT.items()}
    own = torch.arange(len(drawings))
    return {
        "picture to text, first of 256": round(((pictures @ texts.T).argmax(1) == own).float().mean().item(), 3),
        "text to picture, first of 256": round(((texts @ pictures.T).argmax(1) == own).float().mean().item(), 3),
        "truth before a lie in one attribute": round(((pictures * (texts - lies)).sum(1) > 0).float().mean().item(), 3),
        "subject, nearest other picture": subject_retrieval(see),
        "cosine within a held-out character": {
            n: round((f @ f.T).fill_diagonal_(0).sum().item() / 552, 3) for n, f in taught.items()
        },
        "cosine of other pictures to the nearest tofu": round((pictures @ taught["tofu"].T).amax(1).mean().item(), 3),
    }


def subject_retrieval(see: Callable, kinds: int = 60) -> float:
    """Of two pictures each of so many characters, dressed and set differently: is the twin the nearest of all?"""
    rng = Random(f"{SEED}/subjects")
    pairs: dict[str, list[Image.Image]] = defaultdict(list)
    while sum(len(images) >= 2 for images in pairs.values()) < kinds:
        svg, embed = random_character(rng)
        if not embed.subject.endswith("blob"):
            pairs[embed.subject].append(picture(svg, background(rng)[1]))
    twins = [images[:2] for images in pairs.values() if len(images) >= 2]
    features = see([image for pair in twins for image in pair])
    nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)
    return round((nearest == torch.arange(len(features)).bitwise_xor(1)).float().mean().item(), 3)
