"""SDXL's autoencoder: images to latents and back, in tiles and in a precision that does not overflow."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from lora_lab.base.load import pick_dtype
from lora_lab.console import say
from lora_lab.errors import RunError


def tile_vae(vae: AutoencoderKL, side: int) -> None:
    """Let `vae` encode and decode tiles of at most `side` px, which overlap by a quarter and are blended there.

    Attention and group norms see one tile at a time, so tints may differ a little between tiles."""
    vae.enable_tiling()
    # diffusers' own tiles are as large as the images that the VAE was trained on, which an image may not exceed.
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_latent_min_size = max(side // factor // 4, 1) * 4  # a quarter of it is a whole number of latents
    vae.tile_sample_min_size = vae.tile_latent_min_size * factor


@torch.no_grad()
def encode_image(vae: AutoencoderKL, image: Image.Image, name: str) -> Tensor:
    """Latents (C, H / 8, W / 8), float32 on the CPU, of an RGB image whose sides are multiples of the VAE's factor.

    They are the scaled mean of the VAE's posterior: its spread is a thousandth of the noise that training adds.
    SDXL's own VAE overflows in float16; a VAE with `force_upcast` therefore encodes in float32. Raises RunError for
    non-finite values."""
    dtype = vae.dtype
    upcast = vae.config.force_upcast and dtype == torch.float16
    if upcast:
        vae.float()
    pixels = VaeImageProcessor().preprocess(image).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mode()[0].float() * vae.config.scaling_factor
    if upcast:
        vae.to(dtype)
    if not latents.isfinite().all():
        raise RunError(
            f"{name}: the VAE gave values that are not finite; use model.precision=fp32 or another model.vae"
        )
    return latents.cpu().contiguous()


def decode(vae: AutoencoderKL, latents: Tensor, factor: int) -> Tensor:
    """The image (1, 3, H, W), values from -1 to 1, of latents (1, C, H / factor, W / factor).

    After an out-of-memory error the VAE decodes in tiles from then on."""
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    try:
        return vae.decode(latents, return_dict=False)[0]
    except torch.OutOfMemoryError:
        if vae.use_tiling:
            raise
    # Outside of the except clause, where the failed attempt no longer holds memory.
    say("the GPU's memory is not enough to decode whole images: the VAE decodes in tiles from now on")
    tile_vae(vae, max(latents.shape[2:]) * factor // 2)
    return vae.decode(latents, return_dict=False)[0]


@contextmanager
def without_overflow(vae: AutoencoderKL, device: torch.device) -> Iterator[None]:
    """Within the context a VAE that overflows in float16 (`force_upcast`) computes in bfloat16, whose range is that of
    float32 at half the memory, or in float32 where the device has no bfloat16. Its weights come back bit-identical."""
    if not (vae.config.force_upcast and vae.dtype == torch.float16):
        yield
        return
    weights = [(parameter, parameter.data) for parameter in vae.parameters()]
    best = pick_dtype("auto", device)
    vae.to(torch.float32 if best == torch.float16 else best)
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
