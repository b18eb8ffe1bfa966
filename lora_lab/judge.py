"""The models that look at pictures for a score: CLIP, DINOv2 and the captioner, each loaded for its turn and let go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

from lora_lab.base.locate import locate_model
from lora_lab.captions.captioner import load_captioner
from lora_lab.console import quiet_loading
from lora_lab.errors import InputError
from lora_lab.schema import Captioner, Model

BATCH = 16  # pictures that a model sees at once


@dataclass(frozen=True)
class Seen:
    """What the judges made of some pictures and texts: unit vectors in float32, on the CPU."""

    clip: Tensor  # (N, D) of the pictures
    dino: Tensor | None  # (N, E) of the pictures; None without model.dino
    texts: Tensor  # (T, D), CLIP's


def judges(model: Model) -> tuple[str, str | None]:
    """Where CLIP and DINOv2 lie, for `look`. Raises InputError for a folder that is not there."""
    return locate_model("model.judge", model.judge), model.dino and locate_model("model.dino", model.dino)


@torch.inference_mode()
def look(model: Model, pictures: Sequence[Image.Image], texts: Sequence[str], device: torch.device) -> Seen:
    """Embed RGB pictures of any size, and texts of which CLIP reads the first 77 tokens. Raises InputError for a model
    that cannot be loaded or is of another kind."""
    judge, dino = judges(model)
    seen, read = _clip(judge, pictures, texts, device)
    _let_go(device)
    seen_by_dino = None if dino is None else _dino(dino, pictures, device)
    _let_go(device)
    return Seen(seen, seen_by_dino, read)


def _clip(
    location: str, pictures: Sequence[Image.Image], texts: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    clip, processor = _load("model.judge", location, "clip", CLIPModel, CLIPProcessor, device)

    def of_pictures(batch: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(batch), return_tensors="pt").pixel_values
        return clip.get_image_features(pixel_values=pixels.to(device, clip.dtype)).pooler_output

    def of_texts(batch: Sequence[str]) -> Tensor:
        ids = processor(text=list(batch), padding=True, truncation=True, return_tensors="pt").to(device)
        return clip.get_text_features(ids.input_ids, ids.attention_mask).pooler_output

    return _batched(of_pictures, pictures), _batched(of_texts, texts)


def _dino(location: str, pictures: Sequence[Image.Image], device: torch.device) -> Tensor:
    dino, processor = _load("model.dino", location, "dino", AutoModel, AutoImageProcessor, device)

    def of_pictures(batch: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(batch), return_tensors="pt").pixel_values
        return dino(pixel_values=pixels.to(device, dino.dtype)).last_hidden_state[:, 0]

    return _batched(of_pictures, pictures)


def read_back(captioner: Captioner, pictures: Sequence[Image.Image], device: torch.device) -> list[str]:
    """What the captioner says of each picture. Raises InputError if it cannot be loaded."""
    settings = {key: value for key, value in vars(captioner).items() if key not in ("name", "base")}
    loaded = load_captioner(locate_model("captioner.base", captioner.base), str(device), **settings)
    captions = loaded.caption(list(pictures))
    del loaded  # before the device's memory is handed back
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


def _batched(embed: Callable, items: Sequence) -> Tensor:
    parts = [embed(items[start : start + BATCH]).float().cpu() for start in range(0, len(items), BATCH)]
    return normalize(torch.cat(parts), dim=-1) if parts else torch.empty(0)


def _let_go(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
