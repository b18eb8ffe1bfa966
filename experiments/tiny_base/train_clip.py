"""The judge: which caption belongs to which picture, which small lie does not, and which pictures show one subject."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.tiny_base import models, tokenizers
from experiments.tiny_base.augment import moved, noisy, normalized
from experiments.tiny_base.data import FREE, FULL, WRONG, Pictures
from experiments.tiny_base.recipe import BACKGROUNDS_EACH, Recipe
from experiments.tiny_base.training import autocast, fit

HIGHEST_SCALE = 4.6  # of the logits, as a logarithm: CLIP's own bound, 100
SUBJECT_SCALE = 10.0  # of the cosines between pictures: two of one subject need not be the same picture
SUBJECT_WEIGHT = 0.5


def train(work: Path, recipe: Recipe, pictures: Pictures, until: float, log: Callable[[str], None]) -> bool:
    """Into work/parts/clip.safetensors; True when the time is spent."""
    device = pictures.device
    tokenizer, _ = tokenizers.load(work / "data" / "tokenizers")
    clip = models.clip(tokenizer).to(device)

    def seen(index: Tensor, ground: Tensor) -> Tensor:
        rgb = noisy(moved(pictures.rgb(index, ground), zoom=0.1, shift=0.08))
        return embed_pictures(clip, rgb)

    def loss() -> Tensor:
        index, ground = pictures.draw(recipe.clip.batch)
        image = seen(index, ground)
        free = torch.randint(len(FREE), index.shape, device=device)
        text, full, wrong = (
            embed_texts(clip, pictures.clip[index, ground, which].long()) for which in (free, FULL, WRONG)
        )
        scale = clip.logit_scale.clamp(max=HIGHEST_SCALE).exp()
        logits = scale * image @ text.T
        own = torch.arange(len(index), device=device)
        pairs = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        lies = F.softplus(scale * (image * (wrong - full)).sum(-1)).mean()

        other = torch.randint(BACKGROUNDS_EACH, index.shape, device=device)
        partner = seen(pictures.partner(index), other)
        same = pictures.subjects[index][:, None] == pictures.subjects[index][None]
        alike = (SUBJECT_SCALE * image @ partner.T).masked_fill(
            same & ~torch.eye(len(index), dtype=torch.bool, device=device), -1e4
        )
        return pairs + lies + SUBJECT_WEIGHT * F.cross_entropy(alike, own)

    return fit(work / "parts" / "clip.safetensors", {"clip": clip}, loss, recipe.clip, until, log)


def embed_pictures(clip, rgb: Tensor) -> Tensor:
    """Unit vectors (B, 128), fp32."""
    with autocast(rgb.device.type):
        features = clip.visual_projection(clip.vision_model(pixel_values=normalized(rgb)).pooler_output)
    return F.normalize(features.float(), dim=-1)


def embed_texts(clip, ids: Tensor) -> Tensor:
    """Unit vectors (B, 128), fp32."""
    with autocast(ids.device.type):
        features = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    return F.normalize(features.float(), dim=-1)
