"""Choose the device and precision, load the base model that `model._target_` names, and its noise schedule.

The schedule is that of bases to which diffusers gives a DDPM-like scheduler."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTokenizer

from lora_lab.base.locate import locate_model
from lora_lab.base.protocol import BaseModel
from lora_lab.base.single_file import read_single_file
from lora_lab.console import say_once
from lora_lab.errors import InputError
from lora_lab.runs import signals_deferred
from lora_lab.settings.schema import Loss, Model
from lora_lab.settings.setting import imported

SDXL_CONFIG = Path(__file__).with_name("sdxl_config")  # configurations and tokenizer, for single files
LONGEST_COUNTED = 4000  # letters
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The torch device of that name; `auto` is cuda, else mps, else cpu. Raises InputError for an unusable device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name}: not usable here, use device=auto or device=cpu") from error
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the GPU has it, else float16; float32 on a CPU. Raises InputError for fp16 on a CPU."""
    if precision == "fp16" and device.type == "cpu":
        raise InputError("model.precision=fp16: needs a GPU, on a CPU use bf16 or fp32")  # no loss scaling there
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def vae_remedy(dtype: torch.dtype) -> str:
    """What to use where the VAE of a base in `dtype` gives values that are not finite."""
    return "another model.vae" if dtype == torch.float32 else "model.precision=fp32 or another model.vae"


def base_class(model: Model) -> type[BaseModel]:
    """The class that `model._target_` names. Raises InputError if there is none."""
    return imported("model", model._target_)


def load_base(model: Model, device: torch.device, waiting: bool = False) -> BaseModel:
    """The frozen base on `device`; with `waiting` on the CPU, in the precision for `device`.

    Raises InputError if the base cannot be read."""
    return base_class(model).load(model, device, waiting)


def validate_prediction(model: Model, loss: Loss) -> Loss:
    """`loss` with what it leaves to the base filled in, as far as that is known before the base is loaded. Raises
    InputError where it is known not to fit."""
    return base_class(model).validate_loss(model, loss) or loss


def layer_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """By its name in a LoRA file the shape (O, I, ...) of each weight that a LoRA may change, from the headers of the
    base's files; {} where these have other names, or are not on this disk."""
    base, shapes = base_class(model), {}
    root = Path(locate_model("model.base", model.base))
    unreadable = suppress(LocalEntryNotFoundError, HFValidationError, OSError, SafetensorError)
    with unreadable, signals_deferred():  # loading the base reports it
        root = root if root.exists() else Path(snapshot_download(model.base, local_files_only=True))
        for component in (base.network_name, *base.embedding_keys):
            for file in (root / component).glob("*.safetensors"):
                with safe_open(str(file), "pt") as opened:
                    weights = [key for key in opened.keys() if key.endswith(".weight")]  # noqa: SIM118
                    names = [base.lora_key(component, key.removesuffix(".weight")) for key in weights]
                    shapes |= {n: tuple(opened.get_slice(k).get_shape()) for n, k in zip(names, weights, strict=True)}
    return shapes


def token_counter(base: str) -> Callable[[str], int] | None:
    """A function that counts tokens, start and end markers included, with the tokenizer of `model.base`; of a text of
    thousands of letters it counts the beginning, which is beyond CLIP's window.

    None where the tokenizer is not available: a damaged one, or without a network. A single file has SDXL's."""
    location = locate_model("model.base", base)
    if Path(location).is_file():
        location = str(SDXL_CONFIG)
    try:
        with signals_deferred():
            tokenizer = CLIPTokenizer.from_pretrained(location, subfolder="tokenizer", trust_remote_code=False)
    except Exception:  # libraries raise nearly anything, and loading the base names the fault
        return None
    return lambda text: len(tokenizer(text[:LONGEST_COUNTED]).input_ids)


def published_scheduler(model: Model) -> dict[str, Any]:
    """The configuration of the scheduler that a single file is read with: that of model.config, else SDXL's.

    Raises InputError if it cannot be read."""
    folder = SDXL_CONFIG if model.config is None else Path(model.config)
    try:
        return EulerDiscreteScheduler.load_config(str(folder), subfolder="scheduler", local_files_only=True)
    except OSError as error:
        raise InputError(f"model.config={model.config}: has no scheduler/scheduler_config.json: name a base") from error


class DiffusionSchedule:
    """A base.protocol.NoiseSchedule: x_t = sqrt(a_t) x + sqrt(1 - a_t) noise (Ho et al. 2020, arXiv 2006.11239)."""

    def __init__(self, scheduler: Mapping[str, Any], prediction: str, zero_terminal_snr: bool) -> None:
        """`scheduler` is the configuration of the base's scheduler."""
        self._ddpm = DDPMScheduler.from_config(
            scheduler, prediction_type=prediction, rescale_betas_zero_snr=zero_terminal_snr
        )
        self.prediction = prediction
        self.alphas_cumprod = self._ddpm.alphas_cumprod  # (T,)
        self.snr = compute_snr(self._ddpm, torch.arange(len(self.alphas_cumprod)))
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents of the shape of `latents` and `noise` (B, C, h, w) at `timesteps` (B,)."""
        return self._ddpm.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise (B, C, h, w), or for v-prediction sqrt(a_t) noise - sqrt(1 - a_t) x (Salimans and Ho 2022, arXiv
        2202.00512)."""
        velocity = self.prediction == "v_prediction"
        return self._ddpm.get_velocity(latents, noise, timesteps) if velocity else noise


def resolve_prediction_type(loss: Loss, scheduler: Mapping[str, Any]) -> Loss:
    """`loss` with what it leaves to the base filled in from `scheduler`, the configuration of the base's scheduler.

    Raises InputError for a prediction that cannot be trained, and for epsilon with zero terminal SNR."""
    prediction = scheduler.get("prediction_type", "epsilon") if loss.prediction == "auto" else loss.prediction
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(
            f"the base's scheduler states that it predicts {prediction}: use loss.prediction=epsilon or v_prediction"
        )
    zero = scheduler.get("rescale_betas_zero_snr", False) if loss.zero_terminal_snr is None else loss.zero_terminal_snr
    return replace(loss, prediction=prediction, zero_terminal_snr=zero)


def with_prediction_type(scheduler: EulerDiscreteScheduler, loss: Loss) -> EulerDiscreteScheduler:
    """The scheduler of the base, or one that follows the resolved `loss` where that differs.

    A schedule rescaled to zero terminal SNR must also be sampled from its last timestep on, "trailing" (Lin et al.
    2023, arXiv 2305.08891, section 3.3); a base that has zero terminal SNR itself keeps its spacing."""
    config = scheduler.config
    changes: dict[str, Any] = {}
    if loss.prediction != config.get("prediction_type", "epsilon"):
        changes["prediction_type"] = loss.prediction
    if loss.zero_terminal_snr != config.get("rescale_betas_zero_snr", False):
        changes["rescale_betas_zero_snr"] = loss.zero_terminal_snr
        if loss.zero_terminal_snr:
            changes["timestep_spacing"] = "trailing"
    # As keywords: in the configuration itself they would pass for defaults of the base's and be dropped.
    return EulerDiscreteScheduler.from_config(config, **changes) if changes else scheduler


def validate_prediction_type(model: Model, loss: Loss) -> Loss:
    """`loss` with what it leaves to the base filled in, where the base's scheduler can be read before it is loaded.

    Raises InputError for a loss that does not fit that scheduler."""
    location = locate_model("model.base", model.base)
    if Path(location).is_file():
        single = read_single_file(Path(location), has_vae=model.vae not in (None, "auto"))
        if loss.prediction == "auto" and (line := single.line()):
            say_once(f"model.base={model.base}: {line}")
        return resolve_prediction_type(loss, single.scheduler(published_scheduler(model)))
    try:
        scheduler = EulerDiscreteScheduler.load_config(
            location, subfolder="scheduler", local_files_only=not loss.zero_terminal_snr
        )
    except OSError:
        return loss  # the hub is not reachable, or the folder is no base: loading says so
    return resolve_prediction_type(loss, scheduler)
