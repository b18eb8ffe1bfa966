"""What the base predicts, and whether its noise schedule ends in noise alone: its scheduler says, or the user."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from lora_lab.base.locate import locate_model
from lora_lab.errors import InputError
from lora_lab.settings.schema import Loss


def resolve_prediction_type(loss: Loss, scheduler: Mapping[str, Any]) -> Loss:
    """`loss` with what it leaves to the base filled in from `scheduler`, the configuration of the base's scheduler.

    Raises InputError for what cannot be trained: a base of neither prediction, epsilon with zero terminal SNR."""
    prediction = scheduler.get("prediction_type", "epsilon") if loss.prediction == "auto" else loss.prediction
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(
            f"the base's scheduler says that it predicts {prediction}: say loss.prediction=epsilon or v_prediction"
        )
    zero = scheduler.get("rescale_betas_zero_snr", False) if loss.zero_terminal_snr is None else loss.zero_terminal_snr
    return replace(loss, prediction=prediction, zero_terminal_snr=zero)


def apply_prediction_type(pipe: StableDiffusionXLPipeline, loss: Loss) -> Loss:
    """Make the scheduler of `pipe`, from which training and every sampler take theirs, say what `loss` says.

    Returns the settled loss. Whoever rescales the schedule to zero terminal SNR must also draw from its last timestep
    on, "trailing" (Lin et al. 2023, arXiv 2305.08891, section 3.3); a base that says so itself keeps its spacing."""
    said, loss = pipe.scheduler.config, resolve_prediction_type(loss, pipe.scheduler.config)
    changes: dict[str, Any] = {}
    if loss.prediction != said.get("prediction_type", "epsilon"):
        changes["prediction_type"] = loss.prediction
    if loss.zero_terminal_snr != said.get("rescale_betas_zero_snr", False):
        changes["rescale_betas_zero_snr"] = loss.zero_terminal_snr
        if loss.zero_terminal_snr:
            changes["timestep_spacing"] = "trailing"
    if changes:
        # As keywords: in the configuration itself they would pass for defaults of the base's and be dropped.
        pipe.scheduler = EulerDiscreteScheduler.from_config(said, **changes)
    return loss


def validate_prediction(base: str, loss: Loss) -> None:
    """Raise InputError, before `base` is loaded, where its scheduler can be read and `loss` does not fit it."""
    location = locate_model("model.base", base)
    if not loss.zero_terminal_snr or Path(location).is_file():
        return
    try:
        scheduler = EulerDiscreteScheduler.load_config(location, subfolder="scheduler")
    except OSError:
        return  # of a hub that is not reached, or a folder that is no base: loading says so
    resolve_prediction_type(loss, scheduler)
