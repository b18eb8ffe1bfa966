"""The trained parts as the folders that stock classes load: tiny-sdxl, tiny-blip, tiny-clip, all fp16."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import BlipImageProcessor, BlipProcessor, CLIPImageProcessor, CLIPProcessor

from experiments.tiny_base import models, tokenizers, train_vae
from experiments.tiny_base.recipe import PIXELS
from experiments.tiny_base.training import load


def assemble(work: Path, bundle: Path) -> None:
    """From work/parts and work/data/tokenizers into `bundle`."""
    clip_tokenizer, blip_tokenizer = tokenizers.load(work / "data" / "tokenizers")
    _sdxl(work, clip_tokenizer).save_pretrained(bundle / "tiny-sdxl")

    blip = models.blip(blip_tokenizer)
    load(work / "parts" / "blip.safetensors", {"blip": blip})
    blip.tie_weights()
    blip.generation_config.max_length = blip_tokenizer.model_max_length
    blip.half().save_pretrained(bundle / "tiny-blip")
    processor = BlipImageProcessor(size={"height": PIXELS, "width": PIXELS})
    BlipProcessor(image_processor=processor, tokenizer=blip_tokenizer).save_pretrained(bundle / "tiny-blip")

    clip = models.clip(clip_tokenizer)
    load(work / "parts" / "clip.safetensors", {"clip": clip})
    clip.half().save_pretrained(bundle / "tiny-clip")
    processor = CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    CLIPProcessor(image_processor=processor, tokenizer=clip_tokenizer).save_pretrained(bundle / "tiny-clip")


def _sdxl(work: Path, tokenizer) -> StableDiffusionXLPipeline:
    unet, first, second = models.unet(), models.text_encoder(tokenizer), models.text_encoder_2(tokenizer)
    load(work / "parts" / "unet.safetensors", {"unet": unet, "text_encoder": first, "text_encoder_2": second})
    pipe = StableDiffusionXLPipeline(
        vae=train_vae.trained(work),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=models.scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    return pipe.to(torch.float16)
