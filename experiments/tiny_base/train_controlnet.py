"""The ControlNet: what the finished UNet must add to draw along the edges of a picture."""

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.tiny_base import models, tokenizers
from experiments.tiny_base.data import Pictures
from experiments.tiny_base.recipe import BACKGROUNDS_EACH, PIXELS, Recipe
from experiments.tiny_base.render import composite
from experiments.tiny_base.train_unet import Latents, denoising_loss
from experiments.tiny_base.training import autocast, fit, load
from lora_lab.images.edges import canny

LOW, HIGH = 100, 200  # the defaults of structure=canny
NO_CAPTION = 0.5  # share of pictures trained without caption: what they show must then be seen in the edges


def train(work: Path, recipe: Recipe, pictures: Pictures, until: float, log: Callable[[str], None]) -> bool:
    """Into work/parts/controlnet.safetensors; True when the time is spent."""
    device = pictures.device
    clip, _ = tokenizers.load(work / "data" / "tokenizers")
    unet, texts = models.unet(), [models.text_encoder(clip), models.text_encoder_2(clip)]
    frozen = {"unet": unet, "text_encoder": texts[0], "text_encoder_2": texts[1]}
    load(work / "parts" / "unet.safetensors", frozen)
    for module in frozen.values():
        module.to(device).requires_grad_(False).eval()
    unet.to(memory_format=torch.channels_last)
    controlnet = models.controlnet().to(device, memory_format=torch.channels_last)
    start(controlnet, unet)
    edges, latents = Edges(work, device), Latents(work, pictures)

    def predict(
        noisy: Tensor, t: Tensor, states: Tensor, conditions: dict[str, Tensor], index: Tensor, ground: Tensor
    ) -> Tensor:
        told = {"encoder_hidden_states": states, "added_cond_kwargs": conditions, "return_dict": False}
        with autocast(device):
            down, middle = controlnet(noisy, t, controlnet_cond=edges.of(index, ground), **told)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            return unet(noisy, t, **added, **told)[0].float()

    loss = denoising_loss(texts, pictures, latents, recipe.controlnet.batch, predict, NO_CAPTION)
    return fit(
        work / "parts" / "controlnet.safetensors", {"controlnet": controlnet}, loss, recipe.controlnet, until, log
    )


def start(controlnet, unet) -> None:
    """Give the ControlNet what it has in common with the UNet."""
    own = controlnet.state_dict()
    controlnet.load_state_dict({key: value for key, value in unet.state_dict().items() if key in own}, strict=False)


class Edges:
    """The edges of every picture on every background, a bit each; found once, into work/data/edges.npy."""

    def __init__(self, work: Path, device: str):
        file = work / "data" / "edges.npy"
        if not file.is_file():
            indices = range(len(np.load(work / "data" / "clip.npy", mmap_mode="r")))
            # Spawned: OpenMP, which torch uses, does not survive a fork.
            context = multiprocessing.get_context("spawn")
            with context.Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
                np.save(file, np.stack(pool.map(partial(_edges, work / "data"), indices, chunksize=64)))
        self._bits = torch.from_numpy(np.load(file)).to(device)  # (N, backgrounds, H, W / 8)
        self._shifts = torch.arange(7, -1, -1, device=device, dtype=torch.uint8)

    def of(self, index: Tensor, ground: Tensor) -> Tensor:
        """(B, 3, H, W), 1 on edges and 0 elsewhere."""
        bits = (self._bits[index, ground][..., None] >> self._shifts) & 1
        edges = bits.flatten(2).float()[:, None].expand(-1, 3, -1, -1)
        return edges.contiguous(memory_format=torch.channels_last)


def _edges(data: Path, index: int) -> np.ndarray:
    """(backgrounds, H, W / 8), packed."""
    pixels = torch.from_numpy(np.load(data / "pictures.npy", mmap_mode="r")[index].copy())
    grounds = torch.from_numpy(np.load(data / "backgrounds.npy", mmap_mode="r")[index].copy())
    found = np.empty((BACKGROUNDS_EACH, PIXELS, PIXELS), np.uint8)
    for i, rgb in enumerate(composite(pixels[None].expand(BACKGROUNDS_EACH, -1, -1, -1), grounds)):
        seen = ((rgb / 2 + 0.5) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        found[i] = np.asarray(canny(Image.fromarray(seen), LOW, HIGH))[..., 0] > 0
    return np.packbits(found, axis=-1)
