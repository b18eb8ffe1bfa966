"""Load SDXL as diffusers' pipeline: from the hub, a folder, or a single checkpoint file."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import nn

from lora_lab.base.geglu import split_geglu_
from lora_lab.base.load import pick_dtype
from lora_lab.base.locate import locate_model
from lora_lab.console import quiet_loading
from lora_lab.errors import InputError
from lora_lab.settings.schema import Model


def load_pipeline(model: Model, device: torch.device, waiting: bool) -> StableDiffusionXLPipeline:
    """The frozen pipeline on `device`, or with `waiting` on the CPU; in either case in the precision for `device`.

    Raises InputError if the base cannot be read."""
    quiet_loading()
    dtype = pick_dtype(model.precision, device)
    base = locate_model("model.base", model.base)
    vae = None if model.vae is None else _load_vae(model.vae, dtype)
    try:
        pipe = _load_pipeline(base, model, dtype, {} if vae is None else {"vae": vae})
        _refuse_missing_tensors(pipe)
    except Exception as error:  # depending on what is wrong with the files, libraries raise nearly anything
        raise InputError(f"model.base={model.base}: cannot be loaded as SDXL ({_first_line(error)})") from error
    for component in _components(pipe).values():
        component.requires_grad_(False).eval()
    split_geglu_(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    pipe.watermark = None  # it changes the pixels that are trained on and compared
    return pipe if waiting else pipe.to(device)


def _load_vae(name: str, dtype: torch.dtype) -> AutoencoderKL:
    location = locate_model("model.vae", name)
    try:
        if Path(location).is_file():
            return AutoencoderKL.from_single_file(location, dtype=dtype)
        return AutoencoderKL.from_pretrained(location, dtype=dtype)
    except Exception as error:
        raise InputError(f"model.vae={name}: cannot be loaded ({_first_line(error)})") from error


def _load_pipeline(base: str, model: Model, dtype: torch.dtype, components: dict) -> StableDiffusionXLPipeline:
    if Path(base).is_file():
        # Such a file has only weights; configs and tokenizers come from model.config or, through diffusers, the hub.
        return StableDiffusionXLPipeline.from_single_file(base, dtype=dtype, config=model.config, **components)
    variant = None if Path(base).is_dir() else model.variant
    # An explicit dtype everywhere: without one the text encoders get the file's, and the UNet float32.
    return StableDiffusionXLPipeline.from_pretrained(base, dtype=dtype, variant=variant, **components)


def _refuse_missing_tensors(pipe: StableDiffusionXLPipeline) -> None:
    """Raise ValueError where a single file lacks tensors: diffusers is silent, and leaves parameters without memory."""
    for name, component in _components(pipe).items():
        missing = [key for key, parameter in component.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"it has no {name}.{missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))


def _components(pipe: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")
