"""The models that look at pictures for a score: CLIP, DINOv2 and the captioner, each loaded for its turn and let go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

from lora_lab.base.locate import locate_model
from lora_lab.captions.captioner import load_captioner, run_captioner
from lora_lab.console import quiet_loading
from lora_lab.errors import InputError
from lora_lab.settings.schema import Model

BATCH = 16  # pictures that a model sees at once


@dataclass(frozen=True)
class ImageEmbeddings:
    """What one judge makes of N pictures: float32, on the CPU."""

    whole: Tensor  # (N, D), unit vectors
    parts: Tensor  # (N, P, E), a vector for each patch: where the marks are that the whole forgets


@dataclass(frozen=True)
class Embeddings:
    """What the judges made of some pictures and texts."""

    clip: ImageEmbeddings
    dino: ImageEmbeddings | None  # None without model.dino
    texts: Tensor  # (T, D), CLIP's unit vectors


def locate_embedders(model: Model) -> tuple[str, str | None]:
    """Where CLIP and DINOv2 lie, for `look`. Raises InputError for a folder that is not there."""
    return locate_model("model.judge", model.judge), model.dino and locate_model("model.dino", model.dino)


@torch.inference_mode()
def embed(model: Model, pictures: Sequence[Image.Image], texts: Sequence[str], device: torch.device) -> Embeddings:
    """Embed RGB pictures of any size, and texts of which CLIP reads the first 77 tokens. Raises InputError for a model
    that cannot be loaded or is of another kind."""
    judge, dino = locate_embedders(model)
    seen, read = _clip(judge, pictures, texts, device)
    _let_go(device)
    seen_by_dino = None if dino is None else _dino(dino, pictures, device)
    _let_go(device)
    return Embeddings(seen, seen_by_dino, read)


def _clip(
    location: str, pictures: Sequence[Image.Image], texts: Sequence[str], device: torch.device
) -> tuple[ImageEmbeddings, Tensor]:
    clip, processor = _load("model.judge", location, "clip", CLIPModel, CLIPProcessor, device)

    def of_pictures(batch: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        pixels = processor(images=list(batch), return_tensors="pt").pixel_values.to(device, clip.dtype)
        seen = clip.vision_model(pixel_values=pixels, output_hidden_states=True)
        # Of the last layer but one: in the last the patches only serve the whole (Liu et al. 2023, LLaVA).
        return clip.visual_projection(seen.pooler_output), seen.hidden_states[-2][:, 1:]

    def of_texts(batch: Sequence[str]) -> tuple[Tensor]:
        ids = processor(text=list(batch), padding=True, truncation=True, return_tensors="pt").to(device)
        return (clip.get_text_features(ids.input_ids, ids.attention_mask).pooler_output,)

    whole, parts = _batched(of_pictures, pictures)
    (read,) = _batched(of_texts, texts) if texts else (torch.empty(0),)
    return ImageEmbeddings(normalize(whole, dim=-1), parts), normalize(read, dim=-1)


def _dino(location: str, pictures: Sequence[Image.Image], device: torch.device) -> ImageEmbeddings:
    dino, processor = _load("model.dino", location, "dino", AutoModel, AutoImageProcessor, device)
    first = 1 + getattr(dino.config, "num_register_tokens", 0)  # the picture's own and, in some, the registers

    def of_pictures(batch: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        pixels = processor(images=list(batch), return_tensors="pt").pixel_values
        seen = dino(pixel_values=pixels.to(device, dino.dtype)).last_hidden_state
        return seen[:, 0], seen[:, first:]

    whole, parts = _batched(of_pictures, pictures)
    return ImageEmbeddings(normalize(whole, dim=-1), parts)


def caption_images(captioner: Mapping[str, Any], pictures: Sequence[Image.Image], device: torch.device) -> list[str]:
    """The captions of RGB pictures, by the captioner of these settings, loaded for this call only.

    Raises InputError if it cannot be loaded."""
    captions = run_captioner(load_captioner(captioner, device), pictures)
    _let_go(device)
    return captions


def _load(key: str, location: str, kind: str, network: type, processor: type, device: torch.device) -> tuple:
    quiet_loading()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    try:
        found = AutoConfig.from_pretrained(location).model_type
        if not found.startswith(kind):  # it would load, with random weights
            raise InputError(f"{key}={location} is a {found} model, not one of {kind}: name another, or say {key}=null")
        return network.from_pretrained(location, dtype=dtype).to(device).eval(), processor.from_pretrained(location)
    except (OSError, ValueError) as error:  # not found, offline, damaged
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"{key}={location}: cannot be loaded ({reason}); name another or a local folder, or say {key}=null"
        ) from error


def _batched(embed: Callable[[Sequence], tuple[Tensor, ...]], items: Sequence) -> list[Tensor]:
    parts = [embed(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    return [torch.cat(each).float().cpu() for each in zip(*parts, strict=True)]


def _let_go(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
