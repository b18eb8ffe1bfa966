"""The LoRA file that a stage is given: found, read, and what it says of its trigger and of its base."""

from dataclasses import replace
from pathlib import Path

from safetensors import safe_open

from lora_lab.adapters.attach import find_lora
from lora_lab.adapters.tokens import read_tokens
from lora_lab.errors import InputError
from lora_lab.settings.schema import Config, Loss


def resolve_lora(value: str, trigger: str | None) -> Path:
    """The file that lora=`value` means. Raises InputError for one that is not there, that lacks the embeddings that it
    needs, or that was trained on another trigger than `trigger`: that would draw anything but the character."""
    lora = find_lora(value)
    read_tokens(lora)
    its = read_metadata(lora).get("modelspec.trigger_phrase")
    if its and trigger and its != trigger:
        raise InputError(f"{lora.name} was trained on the trigger {its}, not {trigger}: say trigger={its}")
    return lora


def prediction_from_metadata(config: Config, lora: Path | None) -> Loss:
    """What training said of this very base holds for drawing on it, where the command line leaves it open."""
    its, loss = read_metadata(lora) if lora else {}, config.loss
    if its.get("ss_sd_model_name") != config.model.base or "ss_zero_terminal_snr" not in its:
        return loss
    velocity, zero = its.get("modelspec.prediction_type") == "v", its["ss_zero_terminal_snr"] == "True"
    if loss.prediction == "auto":
        loss = replace(loss, prediction="v_prediction" if velocity else "epsilon")
    return replace(loss, zero_terminal_snr=zero) if loss.zero_terminal_snr is None else loss


def read_metadata(lora: Path) -> dict[str, str]:
    """The file's metadata. Raises InputError for what is no such file."""
    try:
        with safe_open(str(lora), "pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise InputError(f"{lora}: is not a readable .safetensors file ({error})") from error
