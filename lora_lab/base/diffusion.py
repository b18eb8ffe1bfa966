"""The noise schedule of bases that diffusers gives a DDPM-like scheduler, and what such a base predicts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from lora_lab.base.locate import locate_model
from lora_lab.errors import InputError
from lora_lab.settings.schema import Loss, Model


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


def validate_prediction_type(model: Model, loss: Loss) -> None:
    """Raise InputError, before the base is loaded, where its scheduler can be read and `loss` does not fit it."""
    location = locate_model("model.base", model.base)
    if not loss.zero_terminal_snr or Path(location).is_file():
        return
    try:
        scheduler = EulerDiscreteScheduler.load_config(location, subfolder="scheduler")
    except OSError:
        return  # the hub is not reachable, or the folder is no base: loading says so
    resolve_prediction_type(loss, scheduler)
