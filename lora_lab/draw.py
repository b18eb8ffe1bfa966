"""Draw fixed prompts and seeds: with a LoRA file, or by the base alone, whose pictures are kept for other runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lora_lab.adapters.wear import worn
from lora_lab.base.cache import Cache, key_of
from lora_lab.base.encode import Encoder
from lora_lab.base.load import load_base, tile_vae
from lora_lab.base.prediction import settle
from lora_lab.base.stored import store
from lora_lab.console import say
from lora_lab.generate import Request, generate
from lora_lab.runs import save_picture
from lora_lab.schema import Config, Loss


@dataclass(frozen=True)
class Asked:
    """A picture that is wanted: under which name, of what, and with which seed."""

    name: str
    prompt: str
    seed: int


def asked_of(prompts: Sequence[str], seeds: Sequence[int], trigger: str) -> list[Asked]:
    """Every prompt, its {trigger} replaced, with every seed, as p0-s0, p0-s1, ..."""
    texts = [text.replace("{trigger}", trigger) for text in prompts]
    return [Asked(f"p{i}-s{seed}", text, seed) for i, text in enumerate(texts) for seed in seeds]


def base_to_draw(config: Config, loss: Loss, device: torch.device) -> Encoder:
    """The base, loaded for a stage that only draws, predicting what `loss` says."""
    memory = config.memory
    pipe = load_base(config.model, device, waiting=memory.offload)
    if memory.vae_tiling:
        tile_vae(pipe.vae, config.model.resolution // 2)
    settle(pipe, loss)
    store(pipe.unet, memory.linear_weights, memory.convolution_weights, device)
    if memory.offload:
        pipe.unet.to("cpu")  # until its turn
    return Encoder(pipe, device, Cache(None), memory.offload)  # a few prompts are encoded sooner than looked up


def draw_with(lora: Path, asked: Sequence[Asked], folder: Path, config: Config, encoder: Encoder) -> list[Image.Image]:
    """Draw with the file on the base, as inference does, and save as `folder`/NAME.png."""
    if not asked:  # to wear it takes a second at SDXL's size
        return []
    sampler = config.sampler
    with worn(encoder.pipe, lora, fuse=sampler.fuse):
        pictures = list(generate(encoder.pipe, _requests(asked, config), sampler, encoder))
    for each, picture in zip(asked, pictures, strict=True):
        save(folder / f"{each.name}.png", picture, each, lora.name)
    return pictures


def draw_without(
    asked: Sequence[Asked], config: Config, base: str, dtype: torch.dtype, folder: Path, encoder: Encoder
) -> tuple[list[Image.Image], list[Path]]:
    """What the base draws without a LoRA, and the files of it: from the cache, or drawn and kept there.

    `base` is the hash of the base's files, `dtype` what it computes in. Without a cache they lie in `folder`."""
    key = key_of_base(config, base, dtype)
    place = (folder if config.cache is None else Path(config.cache)) / "drawn"
    files = [place / f"{key_of(key, each.prompt, each.seed, side_of(config))}.png" for each in asked]
    found = [_opened(file) for file in files]
    missing = [i for i, picture in enumerate(found) if picture is None]
    if not missing:
        return found, files
    with worn(encoder.pipe, None):
        drawn = generate(encoder.pipe, _requests([asked[i] for i in missing], config), config.sampler, encoder)
        for i, picture in zip(missing, drawn, strict=True):
            found[i] = picture
            save(files[i], picture, asked[i], "none")
    return found, files


def save(file: Path, picture: Image.Image, asked: Asked, lora: str) -> None:
    """A PNG that says how it was made."""
    save_picture(file, picture, {"prompt": asked.prompt, "seed": asked.seed, "lora": lora})


def key_of_base(config: Config, base: str, dtype: torch.dtype) -> str:
    """A name of all that decides what the base draws but for prompt, seed and size."""
    model, loss, memory = config.model, config.loss, config.memory
    of_base = (base, model.vae, model.config, model.variant, dtype, loss.prediction, loss.zero_terminal_snr)
    stored = (memory.linear_weights, memory.convolution_weights, memory.vae_tiling)
    return key_of("drawn", *of_base, *stored, vars(config.sampler))


def side_of(config: Config) -> int:
    """Of a drawn picture, in pixels: that of the square bucket."""
    return config.model.resolution // config.model.bucket_step * config.model.bucket_step


def _requests(asked: Sequence[Asked], config: Config) -> list[Request]:
    side = side_of(config)
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
