"""The autoencoder, first and alone: everything after it works on its latents."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from experiments.tiny_base import models
from experiments.tiny_base.augment import moved, sometimes
from experiments.tiny_base.data import Pictures
from experiments.tiny_base.recipe import Recipe
from experiments.tiny_base.training import autocast, fit, load, save

KL_WEIGHT = 1.5e-4  # a third of the usual for such losses: sharper pictures for slightly rougher latents
CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

CHUNK = 32  # pictures that are looked at together


def train(work: Path, recipe: Recipe, pictures: Pictures, until: float, log: Callable[[str], None]) -> bool:
    """Into work/parts/vae.safetensors, whose notes hold the scaling factor when it is done; True then."""
    file = work / "parts" / "vae.safetensors"
    device = pictures.device
    vae = models.vae().to(device, memory_format=torch.channels_last)
    forward = torch.compile(_losses) if device == "cuda" else _losses
    orders = torch.tensor(CHANNEL_ORDERS, device=device)

    def loss() -> Tensor:
        return forward(vae, _varied(pictures.rgb(*pictures.draw(recipe.vae.batch, details=True)), orders))

    if not fit(file, {"vae": vae}, loss, recipe.vae, until, log):
        return False
    spent = load(file, {"vae": vae})
    psnr, spread = measure(vae, pictures)
    log(f"vae: {psnr:.2f} dB on held-out pictures, latents' standard deviation {spread:.3f}")
    save(file, {"vae": vae}, spent["seconds"], spent["steps"], scaling_factor=1 / spread, psnr=psnr)
    return True


def trained(work: Path) -> AutoencoderKL:
    """The finished VAE, fp32, with its scaling factor."""
    vae = models.vae()
    spent = load(work / "parts" / "vae.safetensors", {"vae": vae})
    vae.register_to_config(scaling_factor=spent["notes"]["scaling_factor"])
    return vae.eval()


def _varied(rgb: Tensor, orders: Tensor) -> Tensor:
    """More kinds of pictures than there are: an eighth in other colours, half of those inverted; half mirrored; a third
    zoomed, so that details come in all sizes."""
    batch = len(rgb)
    recoloured = batch // 8
    order = orders[torch.randint(len(orders), (recoloured,), device=rgb.device)]
    other = torch.gather(rgb[:recoloured], 1, order[:, :, None, None].expand(-1, -1, *rgb.shape[2:]))
    rgb = torch.cat([-other[: recoloured // 2], other[recoloured // 2 :], rgb[recoloured:]])
    rgb = sometimes(rgb, rgb.flip(3), 0.5)
    rgb = sometimes(rgb, moved(rgb, zoom=0.3, shift=0.3, turn=20), 0.33)
    return rgb.contiguous(memory_format=torch.channels_last)


def _losses(vae: AutoencoderKL, rgb: Tensor) -> Tensor:
    """Squares of pixels, for the PSNR and so mostly for thin lines; their edges, and colours over 4 x 4 pixels, for the
    eye; KL to keep the latents small."""
    with autocast(rgb.device.type):
        mean, log_variance = vae.quant_conv(vae.encoder(rgb)).float().chunk(2, 1)
        log_variance = log_variance.clamp(-20, 8)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        drawn = vae.decoder(vae.post_quant_conv(latents))
    wrong = drawn.float() - rgb
    edges = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
    coarse = F.avg_pool2d(wrong, 4).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return 0.5 * wrong.abs().mean() + 0.3 * edges + 0.3 * coarse + 25 * wrong.square().mean() + KL_WEIGHT * kl


def measure(vae: AutoencoderKL, pictures: Pictures, size: int = 512) -> tuple[float, float]:
    """The PSNR of held-out pictures in dB, and their latents' standard deviation."""
    rgb = pictures.rgb(*pictures.test(size))
    drawn, latents = reconstructed(vae, rgb)
    return psnr(drawn, rgb), latents.std().item()


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) in [-1, 1] as they come back from the VAE, and the means of their latents, (B, 4, h, w)."""
    latents = [vae.encode(some).latent_dist.mean for some in rgb.split(CHUNK)]
    return torch.cat([vae.decode(some).sample.clamp(-1, 1) for some in latents]), torch.cat(latents)


def psnr(pictures: Tensor, originals: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], whose values span 2, over all their pixels together:
    10 log10(2² / mean((pictures - originals)²))."""
    return 10 * math.log10(4 / (pictures - originals).square().mean().item())
