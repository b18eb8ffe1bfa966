"""How well pictures survive the VAE."""

from random import Random

import torch
from diffusers import AutoencoderKL

from experiments.tiny_base.details import random_details
from experiments.tiny_base.evaluation.bench import SEED, Bench, image_of, pictures_in
from experiments.tiny_base.render import picture, to_image, to_pixels
from experiments.tiny_base.train_vae import psnr, reconstructed
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
        rgb = torch.stack([to_pixels(image) for image in images])
        drawn, _ = reconstructed(model, rgb)
        figures[f"{name}, dB"] = round(psnr(drawn, rgb), 2)
        shown += zip(rgb[-4:], drawn[-4:], strict=True)
    bench.sheet("vae", [to_image(x) for x, _ in shown] + [to_image(y) for _, y in shown])
    return figures
