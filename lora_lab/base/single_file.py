"""What a checkpoint in one file says of itself, by the names and shapes of its tensors and by its metadata.

Only the header is read, so it takes milliseconds, and nothing is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_lab.errors import InputError
from lora_lab.runs import signals_deferred

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT, TEXT_2 = "conditioner.embedders.0.", "conditioner.embedders.1."
FIRST_LAYER = UNET + "input_blocks.0.0.weight"
LATENT_CHANNELS = 4  # of SDXL's VAE
# By parts of tensor names: what a file is that is no SDXL checkpoint.
OTHERS = (
    (("lora_unet_", "lora_te", ".lora_down.", ".lora_A."), "a LoRA: name it with lora= or stage.start_from="),
    (("double_blocks.", "single_blocks."), "a model of the Flux family"),
    (("joint_blocks.",), "Stable Diffusion 3"),
    (("cond_stage_model.model.",), "Stable Diffusion 2"),
    (("cond_stage_model.",), "Stable Diffusion 1"),
    (("conditioner.embedders.0.model.",), "SDXL's refiner, which only finishes images: name the base"),
    (("control_model.", "controlnet_"), "a ControlNet: name it with structure.controlnet="),
)
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}


@dataclass(frozen=True)
class SingleFile:
    """A checkpoint of SDXL in one file."""

    prediction: str | None  # epsilon or v_prediction; None where the file does not say
    zero_terminal_snr: bool

    def scheduler(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of the scheduler: `published`, that of SDXL, with what the file says."""
        changes: dict[str, Any] = {"prediction_type": self.prediction} if self.prediction else {}
        if self.zero_terminal_snr:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {**published, **changes}

    def line(self) -> str:
        """What the file says of its prediction, in words; "" where it says nothing, or what is usual."""
        words = ["v-prediction"] if self.prediction == "v_prediction" else []
        words += ["zero terminal SNR"] if self.zero_terminal_snr else []
        return f"{' and '.join(words)} (read from the file)" if words else ""


@lru_cache(maxsize=4)
def _header(path: Path, changed: int) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """Shape and data type of each tensor, and the metadata; `changed` is the file's time, for the cache."""
    with safe_open(str(path), "np") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        tensors = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
        return tensors, file.metadata() or {}


def read_single_file(path: Path, has_vae: bool = False) -> SingleFile:
    """What the checkpoint says; `has_vae` if the VAE comes from elsewhere (model.vae).

    Raises InputError for a file that is no whole SDXL checkpoint, in words that say what it is, and for one that is
    damaged."""
    try:
        with signals_deferred():
            tensors, metadata = _header(path, path.stat().st_mtime_ns)
    except (OSError, SafetensorError) as error:
        raise InputError(f"model.base={path}: cannot be read ({error}): copy it again") from error
    if reason := _refusal(tensors, has_vae):
        raise InputError(f"model.base={path}: {reason}")
    velocity = metadata.get("ss_v_parameterization") == "True"
    stated = PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower())
    zero = "ztsnr" in tensors or metadata.get("ss_zero_terminal_snr") == "True"
    prediction = "v_prediction" if "v_pred" in tensors or velocity else stated
    return SingleFile(prediction, zero)


def _refusal(tensors: Mapping[str, tuple[tuple[int, ...], str]], has_vae: bool) -> str:
    """Why the file is no base; "" for a whole SDXL checkpoint."""
    for parts, kind in OTHERS:
        if any(part in key for key in tensors for part in parts):
            return f"this is {kind}; SDXL is needed"
    components = {"UNet": UNET, "first text encoder": TEXT, "second text encoder": TEXT_2}
    lacking = [name for name, part in components.items() if not any(key.startswith(part) for key in tensors)]
    if "UNet" in lacking:
        if any(key.startswith(("down_blocks.", "up_blocks.", "mid_block.")) for key in tensors):
            return "this is a UNet alone, in diffusers' names: name the folder of the whole base"
        if any(key.startswith((VAE, "decoder.", "encoder.")) for key in tensors):
            return "this is a VAE alone: name it with model.vae=, and a whole checkpoint with model.base="
        return "this is no checkpoint of SDXL: none of its tensors belongs to a UNet"
    if lacking:
        return f"this checkpoint has no {' and no '.join(lacking)}: name a whole one, as it is published"
    channels = tensors[FIRST_LAYER][0][1] if FIRST_LAYER in tensors else LATENT_CHANNELS
    if channels != LATENT_CHANNELS:
        kind = {9: "an inpainting model", 8: "a model that edits by instructions"}.get(channels, "another model")
        return f"this is {kind} ({channels} channels go into its UNet, SDXL has {LATENT_CHANNELS}): name the base"
    if any(key.endswith((".weight_scale", ".scale_weight", "scaled_fp8")) for key in tensors):
        return "its fp8 weights are scaled, which is for drawing only: name the file in fp16, bf16 or plain fp8"
    if not has_vae and not any(key.startswith(VAE) for key in tensors):
        return "this checkpoint has no VAE: name one with model.vae="
    return ""
