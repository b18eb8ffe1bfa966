"""The models that evaluation looks at images with: CLIP, DINOv2 and the captioner, each loaded for one call only, and
the base model's own network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

from lora_lab.base.encode import Encoder, on_device
from lora_lab.base.locate import loading, locate_model
from lora_lab.captions.captioner import load_captioner, run_captioner
from lora_lab.console import quiet_loading
from lora_lab.errors import InputError
from lora_lab.images.pixels import fit
from lora_lab.settings.schema import Model

BATCH = 16  # images per forward pass
MAX_PARTS = 256  # of an image: as many as DINOv2 has; the time of comparing grows with the square


@dataclass(frozen=True)
class ImageEmbeddings:
    """One model's embeddings of N images: float32, on the CPU."""

    whole: Tensor  # (N, D), unit vectors
    parts: Tensor  # (N, T, E), one vector per patch: local detail that the whole loses


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of N images and T texts."""

    clip: Tensor  # (N, D), unit vectors
    dino: ImageEmbeddings | None  # None without model.dino
    texts: Tensor  # (T, D), CLIP's unit vectors


def locate_embedders(model: Model) -> tuple[str, str | None]:
    """The locations of CLIP and DINOv2, for `embed`. Raises InputError for a missing folder."""
    return locate_model("model.judge", model.judge), model.dino and locate_model("model.dino", model.dino)


@torch.inference_mode()
def embed(model: Model, images: Sequence[Image.Image], texts: Sequence[str], device: torch.device) -> Embeddings:
    """Embed RGB images of any size, and texts, of which CLIP reads the first 77 tokens.

    Raises InputError for a model that cannot be loaded or is of another kind."""
    clip_location, dino_location = locate_embedders(model)
    clip, text_embeddings = _clip(clip_location, images, texts, device)
    _free_gpu_memory(device)
    dino = None if dino_location is None else _dino(dino_location, images, device)
    _free_gpu_memory(device)
    return Embeddings(clip, dino, text_embeddings)


def _clip(
    location: str, images: Sequence[Image.Image], texts: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    clip, processor = _load("model.judge", location, "clip", CLIPModel, CLIPProcessor, device)

    def embed_images(batch: Sequence[Image.Image]) -> tuple[Tensor]:
        pixels = processor(images=list(batch), return_tensors="pt").pixel_values.to(device, clip.dtype)
        return (clip.get_image_features(pixels).pooler_output,)

    def embed_texts(batch: Sequence[str]) -> tuple[Tensor]:
        ids = processor(text=list(batch), padding=True, truncation=True, return_tensors="pt").to(device)
        return (clip.get_text_features(ids.input_ids, ids.attention_mask).pooler_output,)

    (whole,) = _batched(embed_images, images)
    (text_embeddings,) = _batched(embed_texts, texts) if texts else (torch.empty(0),)
    return normalize(whole, dim=-1), normalize(text_embeddings, dim=-1)


def _dino(location: str, images: Sequence[Image.Image], device: torch.device) -> ImageEmbeddings:
    dino, processor = _load("model.dino", location, "dino", AutoModel, AutoImageProcessor, device)
    first = 1 + getattr(dino.config, "num_register_tokens", 0)  # the class token and, in some models, registers

    def embed_images(batch: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        pixels = processor(images=list(batch), return_tensors="pt").pixel_values
        states = dino(pixel_values=pixels.to(device, dino.dtype)).last_hidden_state
        return states[:, 0], states[:, first:]

    whole, parts = _batched(embed_images, images)
    return ImageEmbeddings(normalize(whole, dim=-1), parts)


def image_parts(model: Model, images: Sequence[Image.Image], side: int, encoder: Encoder) -> Tensor:
    """The vectors (N, T, D) of the parts of RGB images, on the device of `encoder`: DINOv2's patches, or without
    `model.dino` what `base_parts` gives.

    Raises InputError for a DINOv2 that cannot be loaded, RunError for non-finite values."""
    if model.dino is None:
        return base_parts(images, side, encoder).to(encoder.device)
    with torch.inference_mode():
        parts = _dino(locate_model("model.dino", model.dino), images, encoder.device).parts
    _free_gpu_memory(encoder.device)
    return parts.to(encoder.device)


@torch.no_grad()
def base_parts(images: Sequence[Image.Image], side: int, encoder: Encoder) -> Tensor:
    """The vectors (N, T, D) of the parts of RGB images, cut to a square of `side` pixels, in the base's own network;
    float32, on the CPU. An adapter in the network is to be disabled by the caller.

    Neighbours are averaged to at most MAX_PARTS parts. Raises RunError for non-finite values."""
    base, device, features = encoder.base, encoder.device, []
    with on_device(base.autoencoder, device, encoder.offload):
        latents = [base.encode_image(fit(image, (side, side)).picture, "an image to be scored") for image in images]
    base.network.eval()  # the next training step sets its own mode
    with on_device(base.network, device, encoder.offload):
        for start in range(0, len(latents), BATCH):
            output = base.features(torch.stack(latents[start : start + BATCH]).to(device))
            while output.shape[2] * output.shape[3] > MAX_PARTS:
                output = avg_pool2d(output, 2)
            features.append(output.flatten(2).transpose(1, 2).cpu())
    return torch.cat(features)


def caption_images(captioner: Mapping[str, Any], images: Sequence[Image.Image], device: torch.device) -> list[str]:
    """The captions of RGB images, by the captioner of these settings, loaded for this call only.

    Raises InputError if it cannot be loaded."""
    captions = run_captioner(load_captioner(captioner, device), images)
    _free_gpu_memory(device)
    return captions


def _load(key: str, location: str, kind: str, network: type, processor: type, device: torch.device) -> tuple:
    quiet_loading()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    hint = f"; name another or a local folder, or set {key}=null"
    with loading(location, f"{key}={location}: cannot be loaded", hint):
        model_type = AutoConfig.from_pretrained(location, trust_remote_code=False).model_type
        if not model_type.startswith(kind):  # it would load, with random weights
            raise InputError(
                f"{key}={location} is a {model_type} model, not one of {kind}: name another, or set {key}=null"
            )
        model = network.from_pretrained(location, dtype=dtype, trust_remote_code=False)
        images = processor.from_pretrained(location, trust_remote_code=False)
    return model.to(device).eval(), images


def _batched(function: Callable[[Sequence], tuple[Tensor, ...]], items: Sequence) -> list[Tensor]:
    outputs = [function(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    return [torch.cat(batches).float().cpu() for batches in zip(*outputs, strict=True)]


def _free_gpu_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
