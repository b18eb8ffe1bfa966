"""The captioner: it writes down everything that can be said of a picture, also of a spoilt one."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiments.tiny_base import models, tokenizers
from experiments.tiny_base.augment import moved, normalized, worn
from experiments.tiny_base.data import Pictures
from experiments.tiny_base.recipe import Recipe
from experiments.tiny_base.training import autocast, fit


def train(work: Path, recipe: Recipe, pictures: Pictures, until: float, log: Callable[[str], None]) -> bool:
    """Into work/parts/blip.safetensors; True when the time is spent."""
    device = pictures.device
    _, tokenizer = tokenizers.load(work / "data" / "tokenizers")
    blip = models.blip(tokenizer).to(device)
    longest = int((pictures.blip != tokenizer.pad_token_id).sum(-1).max())

    # Each word sees those before it; padding stands behind them all. Given as a plain mask of ones, the library would
    # make this one in every step, by a copy from the CPU that can't be captured.
    before = torch.full((1, 1, longest, longest), -1e4, device=device).triu(1)

    def loss() -> Tensor:
        index, ground = pictures.draw(recipe.blip.batch)
        rgb = worn(moved(pictures.rgb(index, ground), zoom=0.1, shift=0.08))
        ids = pictures.blip[index, ground, :longest].long()
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        with autocast(device):
            return blip(pixel_values=normalized(rgb), input_ids=ids, attention_mask=before, labels=labels).loss.float()

    return fit(work / "parts" / "blip.safetensors", {"blip": blip}, loss, recipe.blip, until, log)
