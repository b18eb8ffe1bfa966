"""Draw fixed prompts and seeds: with a LoRA file, or by the base alone, whose pictures are kept for other runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lora_lab.adapters.attach import lora_attached
from lora_lab.base.cache import Cache, key_of
from lora_lab.base.encode import Encoder
from lora_lab.base.load import load_base, tile_vae
from lora_lab.base.prediction import apply_prediction_type
from lora_lab.base.quantize import quantize_
from lora_lab.console import say
from lora_lab.runs import save_picture
from lora_lab.sampling.generate import Request, generate
from lora_lab.settings.decides import base_image_settings
from lora_lab.settings.schema import Config, Loss


@dataclass(frozen=True)
class ImageSpec:
    """A picture that is wanted: under which name, of what, and with which seed."""

    name: str
    prompt: str
    seed: int


def image_specs(prompts: Sequence[str], seeds: Sequence[int], trigger: str) -> list[ImageSpec]:
    """Every prompt, its {trigger} replaced, with every seed, as p0-s0, p0-s1, ..."""
    texts = [text.replace("{trigger}", trigger) for text in prompts]
    return [ImageSpec(f"p{i}-s{seed}", text, seed) for i, text in enumerate(texts) for seed in seeds]


def load_base_for_sampling(config: Config, loss: Loss, device: torch.device) -> Encoder:
    """The base, loaded for a stage that only draws, predicting what `loss` says."""
    memory = config.memory
    pipe = load_base(config.model, device, waiting=memory.offload)
    if memory.vae_tiling:
        tile_vae(pipe.vae, config.model.resolution // 2)
    apply_prediction_type(pipe, loss)
    quantize_(pipe.unet, memory.linear_weights, memory.convolution_weights, device)
    if memory.offload:
        pipe.unet.to("cpu")  # until its turn
    return Encoder(pipe, device, Cache(None), memory.offload)  # a few prompts are encoded sooner than looked up


def render_with_lora(
    lora: Path, asked: Sequence[ImageSpec], folder: Path, config: Config, encoder: Encoder
) -> list[Image.Image]:
    """Draw with the file on the base, as inference does, and save as `folder`/NAME.png."""
    if not asked:  # to wear it takes a second at SDXL's size
        return []
    sampler = config.sampler
    with lora_attached(encoder.pipe, lora, fuse=sampler.fuse):
        pictures = list(generate(encoder.pipe, _requests(asked, config), sampler, encoder))
    for each, picture in zip(asked, pictures, strict=True):
        save_image(folder / f"{each.name}.png", picture, each, lora.name)
    return pictures


def render_base(
    asked: Sequence[ImageSpec], config: Config, base: str, dtype: torch.dtype, folder: Path, encoder: Encoder
) -> tuple[list[Image.Image], list[Path]]:
    """What the base draws without a LoRA, and the files of it: from the cache, or drawn and kept there.

    `base` is the hash of the base's files, `dtype` what it computes in. Without a cache they lie in `folder`."""
    key = base_image_key(config, base, dtype)
    place = (folder if config.cache is None else Path(config.cache)) / "drawn"
    files = [place / f"{key_of(key, each.prompt, each.seed, image_side(config))}.png" for each in asked]
    found = [_opened(file) for file in files]
    missing = [i for i, picture in enumerate(found) if picture is None]
    if not missing:
        return found, files
    with lora_attached(encoder.pipe, None):
        drawn = generate(encoder.pipe, _requests([asked[i] for i in missing], config), config.sampler, encoder)
        for i, picture in zip(missing, drawn, strict=True):
            found[i] = picture
            save_image(files[i], picture, asked[i], "none")
    return found, files


def save_image(file: Path, picture: Image.Image, asked: ImageSpec, lora: str) -> None:
    """A PNG that says how it was made."""
    save_picture(file, picture, {"prompt": asked.prompt, "seed": asked.seed, "lora": lora})


def base_image_key(config: Config, base: str, dtype: torch.dtype) -> str:
    """A name of all that decides what the base draws but for prompt, seed and size."""
    return key_of("drawn", base, dtype, base_image_settings(config.model, config.loss, config.memory, config.sampler))


def image_side(config: Config) -> int:
    """Of a drawn picture, in pixels: that of the square bucket."""
    return config.model.resolution // config.model.bucket_step * config.model.bucket_step


def _requests(asked: Sequence[ImageSpec], config: Config) -> list[Request]:
    side = image_side(config)
    return [Request(each.prompt, each.seed, (side, side)) for each in asked]


def _opened(file: Path) -> Image.Image | None:
    """A picture that was kept; None if there is none, or if it is not whole any more, which is said."""
    if not file.is_file():
        return None
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError):
        say(f"{file} is damaged: it is drawn again")
        return None
