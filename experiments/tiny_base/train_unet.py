"""The UNet and both text encoders, from nothing, on the finished VAE's latents."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiments.tiny_base import models, tokenizers, train_vae
from experiments.tiny_base.data import FREE, Pictures
from experiments.tiny_base.recipe import BACKGROUNDS_EACH, PIXELS, Recipe
from experiments.tiny_base.training import autocast, fit

MIN_SNR = 5.0
NOISE_OFFSET = 0.1  # lets a picture's mean colour be learnt, and so plain backgrounds
NO_CAPTION = 0.1  # share of pictures trained without caption, for guidance

# SDXL is told a picture's original size and where it was cut. Nearly all of ours are whole and small; the others keep
# the base from falling silent when a trainer passes other numbers.
ODD_SIZE, SIZES = 0.4, (96, 1600)
ODD_CROP, CROPS = 0.15, (0, 64)


def train(work: Path, recipe: Recipe, pictures: Pictures, until: float, log: Callable[[str], None]) -> bool:
    """Into work/parts/unet.safetensors and text.safetensors side by side in one file; True when the time is spent."""
    device = pictures.device
    clip, _ = tokenizers.load(work / "data" / "tokenizers")
    unet = models.unet().to(device, memory_format=torch.channels_last)
    texts = [models.text_encoder(clip).to(device), models.text_encoder_2(clip).to(device)]
    latents = Latents(work, pictures)
    predicted = torch.compile(_predicted) if device == "cuda" else _predicted

    def predict(noisy: Tensor, t: Tensor, states: Tensor, conditions: dict[str, Tensor], *_: Tensor) -> Tensor:
        return predicted(unet, noisy, t, states, conditions)

    loss = denoising_loss(texts, pictures, latents, recipe.unet.batch, predict, NO_CAPTION, NOISE_OFFSET)
    modules = {"unet": unet, "text_encoder": texts[0], "text_encoder_2": texts[1]}
    return fit(work / "parts" / "unet.safetensors", modules, loss, recipe.unet, until, log)


def denoising_loss(
    texts: list,
    pictures: Pictures,
    latents: "Latents",
    batch: int,
    predict: Callable[..., Tensor],
    no_caption: float,
    noise_offset: float = 0.0,
) -> Callable[[], Tensor]:
    """What a step of a training for noise minimizes: its error, weighted by min-SNR.

    `predict` gets the noisy latents (B, 4, h, w), timesteps (B,), text states (B, 77, D), the other conditions, and
    which pictures on which backgrounds (B,) each; the text of a share `no_caption` of them is zeros."""
    device = pictures.device
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, device=device) ** 2
    kept = torch.cumprod(1 - betas, 0)
    snr = kept / (1 - kept)
    weights = snr.clamp(max=MIN_SNR) / snr

    def loss() -> Tensor:
        index, ground = pictures.draw(batch)
        clean = latents.sample(index, ground)
        caption = torch.randint(len(FREE), (batch,), device=device)
        states, pooled = encode(texts, pictures.clip[index, ground, caption].long())
        said = (torch.rand(batch, device=device) > no_caption).float()
        noise = torch.randn_like(clean)
        if noise_offset:
            noise = noise + noise_offset * torch.randn(batch, 4, 1, 1, device=device)
        t = torch.randint(1000, (batch,), device=device)
        amount = kept[t][:, None, None, None]
        noisy = (amount.sqrt() * clean + (1 - amount).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        conditions = {"text_embeds": pooled * said[:, None], "time_ids": time_ids(batch, device)}
        predicted = predict(noisy, t, states * said[:, None, None], conditions, index, ground)
        return ((predicted - noise).square().mean((1, 2, 3)) * weights[t]).mean()

    return loss


def encode(texts: list, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As SDXL does: both encoders' last states but one side by side, (B, 77, 256), and the second's projection."""
    with autocast(ids.device.type):
        first = texts[0](input_ids=ids, output_hidden_states=True)
        second = texts[1](input_ids=ids, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    return states.float(), second.text_embeds.float()


def time_ids(batch: int, device: str) -> Tensor:
    """(B, 6): original height and width, crop top and left, target height and width."""
    whole = torch.full((batch, 2), float(PIXELS), device=device)
    size = torch.randint(*SIZES, (batch, 1), device=device).float().expand(-1, 2)
    size = torch.where(torch.rand(batch, 1, device=device) < ODD_SIZE, size, whole)
    crop = torch.randint(*CROPS, (batch, 2), device=device).float()
    crop = crop * (torch.rand(batch, 1, device=device) < ODD_CROP)
    return torch.cat([size, crop, whole], 1)


def _predicted(unet, noisy: Tensor, t: Tensor, states: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    with autocast(noisy.device.type):
        return unet(noisy, t, states, added_cond_kwargs=conditions, return_dict=False)[0].float()


class Latents:
    """Every picture on every background through the VAE once: mean and standard deviation, fp16, scaled."""

    @torch.no_grad()
    def __init__(self, work: Path, pictures: Pictures):
        device = pictures.device
        vae = train_vae.trained(work).to(device)
        shape = (len(pictures.subjects), BACKGROUNDS_EACH, 4, models.LATENT_PIXELS, models.LATENT_PIXELS)
        self.mean, self.std = (torch.empty(shape, dtype=torch.float16, device=device) for _ in range(2))
        chunk = 512 if device == "cuda" else 8
        for ground in range(BACKGROUNDS_EACH):
            for index in torch.arange(shape[0], device=device).split(chunk):
                rgb = pictures.rgb(index, torch.full_like(index, ground))
                with autocast(device):
                    posterior = vae.encode(rgb).latent_dist
                self.mean[index, ground] = (posterior.mean * vae.config.scaling_factor).half()
                self.std[index, ground] = (posterior.std * vae.config.scaling_factor).half()

    def sample(self, index: Tensor, ground: Tensor) -> Tensor:
        """(B, 4, 32, 32), fp32."""
        mean = self.mean[index, ground].float()
        return mean + self.std[index, ground].float() * torch.randn_like(mean)
