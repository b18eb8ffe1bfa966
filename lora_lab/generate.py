"""Draw: text-to-image and img2img in one function, for validation, the img2img stage and everybody else."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from hydra.utils import instantiate
from PIL import Image

from lora_lab.console import bar
from lora_lab.errors import InputError
from lora_lab.schema import Sampler


@dataclass(frozen=True)
class Request:
    """One picture to draw. With a `photo` (RGB, sides multiples of the model's step) it is img2img of its size."""

    prompt: str
    seed: int
    size: tuple[int, int]  # width, height in pixels
    photo: Image.Image | None = None
    strength: float = 1.0


def check_strength(steps: int, strength: float) -> None:
    """diffusers runs int(steps * strength) steps, and crashes where that is none."""
    if int(steps * strength) < 1:
        raise InputError(
            f"stage.strength={strength} with sampler.steps={steps} leaves no step to run: "
            f"use a strength of at least {math.ceil(100 / steps) / 100} or more steps"
        )


@torch.inference_mode()
def generate(
    pipe: StableDiffusionXLPipeline,
    requests: list[Request],
    sampler: Sampler,
) -> Iterator[Image.Image]:
    """Draw every request with what `pipe` wears (adapters.wear.worn), yielding each picture as it is done.

    One picture at a time: it must not depend on the company it was drawn in, and batched kernels round differently.
    The noise comes from a CPU generator, so a seed means the same on every device."""
    scheduler = instantiate(sampler.scheduler)(pipe.scheduler.config)
    parts = {**pipe.components, "scheduler": scheduler}
    text_to_image = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    img2img = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    for request in bar(requests, desc="draw", unit="picture", leave=False):
        common = dict(
            prompt=request.prompt,
            negative_prompt=sampler.negative_prompt or None,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            generator=torch.Generator("cpu").manual_seed(request.seed),
        )
        if request.photo is None:
            draw, width, height = text_to_image, *request.size
            common |= {"width": width, "height": height}
        else:
            check_strength(sampler.steps, request.strength)
            draw = img2img
            common |= {"image": request.photo, "strength": request.strength}
        draw.set_progress_bar_config(disable=True)
        yield draw(**common).images[0]
