"""The trained parts as the folders that stock classes load: tiny-sdxl, tiny-blip, tiny-clip, tiny-controlnet, all fp16;
and the way back."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from transformers import (
    BertTokenizerFast,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
)

from experiments.tiny_base import models, tokenizers, train_vae
from experiments.tiny_base.recipe import PIXELS
from experiments.tiny_base.training import load, save


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

    controlnet = models.controlnet()
    load(work / "parts" / "controlnet.safetensors", {"controlnet": controlnet})
    controlnet.half().save_pretrained(bundle / "tiny-controlnet")


def unpack(bundle: Path, work: Path) -> None:
    """The base, BLIP and CLIP of a finished `bundle` as work/data and work/parts have them, so that what is trained on
    them can be trained anew by itself."""
    if (work / "data" / "tokenizers").is_dir():
        return
    pipe = StableDiffusionXLPipeline.from_pretrained(bundle / "tiny-sdxl")
    parts = work / "parts"
    save(parts / "vae.safetensors", {"vae": pipe.vae}, scaling_factor=pipe.vae.config.scaling_factor)
    texts = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    save(parts / "unet.safetensors", {"unet": pipe.unet, **texts})
    blip = BlipForConditionalGeneration.from_pretrained(bundle / "tiny-blip")
    save(parts / "blip.safetensors", {"blip": blip})
    save(parts / "clip.safetensors", {"clip": CLIPModel.from_pretrained(bundle / "tiny-clip")})
    for name in ("vae", "unet", "blip", "clip"):
        (parts / f"{name}.done").touch()
    clip_tokenizer = CLIPTokenizerFast.from_pretrained(bundle / "tiny-sdxl" / "tokenizer")
    tokenizers.save(
        work / "data" / "tokenizers", clip_tokenizer, BertTokenizerFast.from_pretrained(bundle / "tiny-blip")
    )


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
