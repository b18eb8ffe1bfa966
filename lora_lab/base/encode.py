"""What the frozen parts make of pictures and captions, computed once: latents, text embeddings, micro-conditioning."""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from lora_lab.errors import RunError


@dataclass(frozen=True)
class TextEmbedding:
    """One caption as SDXL's UNet sees it."""

    tokens: Tensor  # (77, 2048): both encoders side by side
    pooled: Tensor  # (1280,): the second encoder's


@torch.no_grad()
def encode_caption(pipe: StableDiffusionXLPipeline, caption: str) -> TextEmbedding:
    """Captions longer than 77 tokens are cut by CLIP (stage=check names them)."""
    tokens, _, pooled, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
    return TextEmbedding(tokens[0].cpu(), pooled[0].cpu())


@torch.no_grad()
def encode_picture(pipe: StableDiffusionXLPipeline, picture: Image.Image, name: str) -> Tensor:
    """Latents (4, height / 8, width / 8) of an RGB picture whose sides are multiples of the VAE's factor (8 for SDXL).

    The mean of the VAE's posterior, scaled: its spread is a thousandth of the noise that training adds.
    SDXL's own VAE overflows in float16, so a VAE that asks for it (force_upcast) encodes in float32."""
    vae = pipe.vae
    dtype = vae.dtype
    upcast = vae.config.force_upcast and dtype == torch.float16
    if upcast:
        vae.float()
    pixels = VaeImageProcessor().preprocess(picture).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mode()[0].float() * vae.config.scaling_factor
    if upcast:
        vae.to(dtype)
    if not latents.isfinite().all():
        raise RunError(
            f"{name}: the VAE gave numbers that are not finite; use model.precision=fp32 or another model.vae"
        )
    return latents.cpu()


def micro_conditioning(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """SDXL's six numbers (6,): original height and width, crop top and left, target height and width, all in pixels.

    Source: Podell et al. 2023, arXiv 2307.01952, section 2.2."""
    return torch.tensor([*original, *crop, *target], dtype=torch.float32)
