"""Load SDXL as diffusers' pipeline: from the hub, a folder, or a single checkpoint file."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import nn

from lora_lab.base.geglu import split_geglu_
from lora_lab.base.locate import locate_model
from lora_lab.console import quiet_loading
from lora_lab.errors import InputError
from lora_lab.settings.schema import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu; a device that is not there is an InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name}: not usable here, say device=auto or device=cpu") from error
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the GPU has it, else float16; float32 on a CPU. Raises InputError for fp16 on a CPU."""
    if precision == "fp16" and device.type == "cpu":
        raise InputError("model.precision=fp16: needs a GPU, on a CPU say bf16 or fp32")  # no loss scaling there
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def load_base(model: Model, device: torch.device, waiting: bool = False) -> StableDiffusionXLPipeline:
    """The frozen pipeline on `device`, in the precision for that also while it is `waiting` for its turn on the CPU.

    Raises InputError when the base cannot be read."""
    quiet_loading()
    dtype = pick_dtype(model.precision, device)
    base = locate_model("model.base", model.base)
    vae = None if model.vae is None else _load_vae(model.vae, dtype)
    try:
        pipe = _load_pipeline(base, model, dtype, {} if vae is None else {"vae": vae})
        _refuse_holes(pipe)
    except Exception as error:  # by what is wrong with the files, libraries raise nearly anything
        raise InputError(f"model.base={model.base}: cannot be loaded as SDXL ({_sentence(error)})") from error
    for part in _parts(pipe).values():
        part.requires_grad_(False).eval()
    split_geglu_(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    pipe.watermark = None  # changes the pixels of what is learnt from and compared
    return pipe if waiting else pipe.to(device)


def tile_vae(vae: AutoencoderKL, side: int) -> None:
    """Let `vae` encode and decode tiles of at most `side` px, which overlap by a quarter and are blended there.

    A tile knows nothing of the others: its attention and group norms see it alone, so tints may differ a little."""
    vae.enable_tiling()
    # diffusers' own tiles are as large as what the VAE was trained on, which a picture may not exceed.
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    vae.tile_latent_min_size = max(side // factor // 4, 1) * 4  # a quarter of it is whole latent pixels
    vae.tile_sample_min_size = vae.tile_latent_min_size * factor


def _load_vae(name: str, dtype: torch.dtype) -> AutoencoderKL:
    location = locate_model("model.vae", name)
    try:
        if Path(location).is_file():
            return AutoencoderKL.from_single_file(location, dtype=dtype)
        return AutoencoderKL.from_pretrained(location, dtype=dtype)
    except Exception as error:
        raise InputError(f"model.vae={name}: cannot be loaded ({_sentence(error)})") from error


def _load_pipeline(base: str, model: Model, dtype: torch.dtype, parts: dict) -> StableDiffusionXLPipeline:
    if Path(base).is_file():
        # Only weights are in such a file; configs and tokenizers come from model.config or, by diffusers, from the hub.
        return StableDiffusionXLPipeline.from_single_file(base, dtype=dtype, config=model.config, **parts)
    variant = None if Path(base).is_dir() else model.variant
    # An explicit dtype everywhere: without one the text encoders come in the file's, the UNet in float32.
    return StableDiffusionXLPipeline.from_pretrained(base, dtype=dtype, variant=variant, **parts)


def _refuse_holes(pipe: StableDiffusionXLPipeline) -> None:
    """A single file may lack tensors: diffusers says nothing, and leaves parameters without memory."""
    for part, network in _parts(pipe).items():
        missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"it has no {part}.{missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))


def _parts(pipe: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")
