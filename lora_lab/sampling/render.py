"""Render fixed prompts and seeds: with a LoRA file, or with the base alone, whose images are kept for other runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lora_lab.adapters.attach import lora_attached
from lora_lab.base.cache import Cache, key_of
from lora_lab.base.encode import Encoder
from lora_lab.base.load import load_base
from lora_lab.base.quantize import quantize_
from lora_lab.console import say
from lora_lab.runs import save_picture
from lora_lab.sampling.generate import Request, generate
from lora_lab.settings.decides import base_image_settings
from lora_lab.settings.schema import Loss, Memory, Model, Sampler


@dataclass(frozen=True)
class ImageSpec:
    """An image to render: its file's name without suffix, its prompt and its seed."""

    name: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class RenderSettings:
    """How images of fixed prompts and seeds are rendered, and where those of the base are kept."""

    sampler: Sampler
    side: int  # pixels
    base_key: str  # a hash of all that decides what the base renders, apart from prompt, seed and side
    cache: Path | None  # None keeps the base's images in the run folder


def render_settings(
    model: Model, loss: Loss, memory: Memory, sampler: Sampler, cache: str | None, base: str, dtype: torch.dtype
) -> RenderSettings:
    """How a run with these settings renders. `base` is the hash of the base's files, `dtype` its precision."""
    key = key_of("drawn", base, dtype, base_image_settings(model, loss, memory, sampler))
    return RenderSettings(sampler, image_side(model), key, cache and Path(cache))


def image_side(model: Model) -> int:
    """The side of a rendered image in pixels: that of the square bucket."""
    return model.resolution // model.bucket_step * model.bucket_step


def image_specs(prompts: Sequence[str], seeds: Sequence[int], trigger: str) -> list[ImageSpec]:
    """Every prompt, with {trigger} replaced, with every seed, as p0-s0, p0-s1, ..."""
    texts = [text.replace("{trigger}", trigger) for text in prompts]
    return [ImageSpec(f"p{i}-s{seed}", text, seed) for i, text in enumerate(texts) for seed in seeds]


def load_base_for_sampling(model: Model, memory: Memory, loss: Loss, device: torch.device) -> Encoder:
    """The base, loaded for a stage that only samples, with the prediction of `loss`. Raises InputError."""
    base = load_base(model, device, waiting=memory.offload)
    if memory.vae_tiling:
        base.enable_tiling(model.resolution // 2)
    base.apply_loss(loss)
    quantize_(base.network, memory.linear_weights, memory.convolution_weights, device)
    if memory.offload:
        base.network.to("cpu")  # until it samples
    return Encoder(base, device, Cache(None), memory.offload)  # a few prompts are encoded sooner than looked up


def render_with_lora(
    lora: Path, specs: Sequence[ImageSpec], folder: Path, settings: RenderSettings, encoder: Encoder
) -> list[Image.Image]:
    """Render `specs` with the LoRA file on the base, as inference does, and save them as `folder`/NAME.png.

    Raises InputError for a file that does not fit, RunError for non-finite values."""
    if not specs:  # attaching the file takes a second at SDXL's size
        return []
    sampler = settings.sampler
    with lora_attached(encoder.base, lora, fuse=sampler.fuse):
        images = list(generate(encoder.base, _requests(specs, settings), sampler, encoder))
    for spec, image in zip(specs, images, strict=True):
        save_image(folder / f"{spec.name}.png", image, spec, lora.name)
    return images


def render_base(
    specs: Sequence[ImageSpec], settings: RenderSettings, folder: Path, encoder: Encoder
) -> tuple[list[Image.Image], list[Path]]:
    """The base's images of `specs` without a LoRA, and their files: from the cache, or rendered and stored there.

    Without a cache the files lie in the run `folder`. Raises RunError for non-finite values."""
    place = (settings.cache or folder) / "drawn"
    files = [place / f"{key_of(settings.base_key, s.prompt, s.seed, settings.side)}.png" for s in specs]
    images = [_stored_image(file) for file in files]
    missing = [i for i, image in enumerate(images) if image is None]
    if not missing:
        return images, files
    with lora_attached(encoder.base, None):
        requests = _requests([specs[i] for i in missing], settings)
        for i, image in zip(missing, generate(encoder.base, requests, settings.sampler, encoder), strict=True):
            images[i] = image
            save_image(files[i], image, specs[i], "none")
    return images, files


def save_image(file: Path, image: Image.Image, spec: ImageSpec, lora: str) -> None:
    """Save a PNG whose metadata says how it was rendered."""
    save_picture(file, image, {"prompt": spec.prompt, "seed": spec.seed, "lora": lora})


def _requests(specs: Sequence[ImageSpec], settings: RenderSettings) -> list[Request]:
    return [Request(spec.prompt, spec.seed, (settings.side, settings.side)) for spec in specs]


def _stored_image(file: Path) -> Image.Image | None:
    """The stored image; None if there is none, or if the file is damaged, which is printed."""
    if not file.is_file():
        return None
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError):
        say(f"{file} is damaged: it is drawn again")
        return None
