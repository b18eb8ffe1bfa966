"""How well pictures survive the VAE."""

import math
from random import Random
from statistics import mean

import torch
from diffusers import AutoencoderKL

from experiments.tiny_base.details import random_details
from experiments.tiny_base.evaluation.bench import SEED, Bench, image_of, pictures_in
from experiments.tiny_base.render import picture, to_image, to_pixels
from lora_lab import demo


def vae(bench: Bench) -> dict:
    """PSNR in dB over all pixels, decoded from the latents' mean."""
    model = AutoencoderKL.from_pretrained(bench.bundle / "tiny-sdxl" / "vae", torch_dtype=torch.float32).eval()
    rng = Random(f"{SEED}/details")
    sets = {
        "held-out": [image_of(drawn) for drawn in bench.drawings(100, 160)],
        "tofu": pictures_in(demo.TOFU),
        "details": [picture(random_details(rng), (0, 0, 0)) for _ in range(40)],
    }
    figures, shown = {}, []
    for name, images in sets.items():
        with torch.inference_mode():
            pairs = [
                (x, model.decode(model.encode(x[None]).latent_dist.mean).sample[0]) for x in map(to_pixels, images)
            ]
        squares = [(y.clamp(-1, 1) - x).square().mean().item() for x, y in pairs]
        figures[f"{name}, dB"] = round(10 * math.log10(4 / mean(squares)), 2)
        shown += pairs[-4:]
    bench.sheet("vae", [to_image(x) for x, _ in shown] + [to_image(y) for _, y in shown])
    return figures
