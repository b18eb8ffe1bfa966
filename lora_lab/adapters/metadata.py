"""The metadata of a LoRA file: what other programs show of it, and what sampling reads back."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from peft import PeftConfig
from safetensors import safe_open
from torch import Tensor

from lora_lab import __version__
from lora_lab.adapters.keys import adapter_kind, by_layer, rank_of
from lora_lab.errors import InputError
from lora_lab.settings.schema import Loss


def network_metadata(config: PeftConfig, state: dict[str, Tensor], lora_plus_ratio: float) -> dict[str, str]:
    """What kind of adapter `state` (of kohya_state) is, by its keys and shapes, in the words of kohya's scripts and of
    LyCORIS."""
    kind, layers = adapter_kind(state), by_layer(state)
    ranked = [leaves for leaves in layers if rank_of(leaves)]
    ranks = {rank_of(leaves) for leaves in ranked} or {config.r}
    alphas = {leaves["alpha"].item() for leaves in ranked} or {float(config.r)}
    dim, alpha = (str(values.pop()) if len(values) == 1 else "Dynamic" for values in (ranks, alphas))
    args: dict[str, object] = {}
    if kind == "DoRA":
        args = {"algo": "lora", "dora_wd": True, "wd_on_output": True}
    elif kind != "LoRA":
        args = {"algo": kind.lower(), "use_tucker": config.use_effective_conv2d}
    if kind == "LoKr":
        args |= {"factor": config.decompose_factor, "decompose_both": config.decompose_both}
    if any(value.ndim == 4 for value in state.values()):
        args |= {"conv_dim": dim, "conv_alpha": alpha}
    if lora_plus_ratio != 1:
        args["loraplus_lr_ratio"] = lora_plus_ratio
    network = {
        "ss_network_module": "networks.lora" if kind == "LoRA" else "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
    }
    return network | ({"ss_network_args": json.dumps({k: str(v) for k, v in args.items()})} if args else {})


def metadata(
    *, name: str, base: str, kind_of_base: Mapping[str, str], trigger: str, network: dict[str, str], lr: float,
    steps: int, batch_size: int, seed: int, resolution: int, captions: list[str], loss: Loss, prediction: str,
    dataset_hash: str, base_hash: str,
) -> dict[str, str]:  # fmt: skip
    """What other programs show of the file; every value is a string, as safetensors requires.

    `kind_of_base` is BaseModel.lora_metadata, `network` what network_metadata gives, `loss` is resolved, `prediction`
    is NoiseSchedule.prediction. `ss_*` are kohya's keys: Forge offers the words of ss_tag_frequency. `modelspec.*` is
    Stability's specification 1.0.0."""
    masked = "" if loss.masks == "none" else f", masks: {loss.masks}"
    huber = loss.type in ("huber", "smooth_l1")
    counts: dict[str, int] = {}
    for caption in captions:
        for phrase in filter(None, (p.strip() for p in caption.split(","))):
            counts[phrase] = counts.get(phrase, 0) + 1
    return {
        "ss_output_name": name,
        "ss_sd_model_name": base,
        "ss_sd_model_hash": base_hash,
        **kind_of_base,
        **network,
        "ss_learning_rate": str(lr),
        "ss_steps": str(steps),
        "ss_max_train_steps": str(steps),
        "ss_batch_size_per_device": str(batch_size),
        "ss_seed": str(seed),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_num_train_images": str(len(captions)),
        "ss_zero_terminal_snr": str(loss.zero_terminal_snr),
        "ss_min_snr_gamma": str(loss.snr_gamma if loss.weighting == "min_snr" else None),
        "ss_debiased_estimation": str(loss.weighting == "debiased"),
        "ss_loss_type": loss.type,
        "ss_huber_schedule": str(loss.huber_schedule if huber else None),
        "ss_huber_c": str(loss.huber_c if huber else None),
        "ss_noise_offset": str(loss.noise_offset or None),
        "ss_multires_noise_iterations": str(loss.pyramid_iterations or None),
        "ss_multires_noise_discount": str(loss.pyramid_discount if loss.pyramid_iterations else None),
        "ss_tag_frequency": json.dumps({trigger: counts}, ensure_ascii=False),
        "ss_training_comment": f"lora_lab {__version__}, dataset {dataset_hash}{masked}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        "modelspec.timestep_range": f"{loss.min_timestep},{loss.max_timestep}",
    }


def prediction_from_metadata(loss: Loss, base: str, lora: Path | None) -> Loss:
    """`loss` with the prediction that the file's metadata states, where `loss` leaves it open and the file was trained
    on the same `base` (model.base). Raises InputError for an unreadable file."""
    stated = read_metadata(lora) if lora else {}
    if stated.get("ss_sd_model_name") != base or "ss_zero_terminal_snr" not in stated:
        return loss
    prediction, zero = stated.get("modelspec.prediction_type"), stated["ss_zero_terminal_snr"] == "True"
    if loss.prediction == "auto" and prediction != "flow":
        loss = replace(loss, prediction="v_prediction" if prediction == "v" else "epsilon")
    return replace(loss, zero_terminal_snr=zero) if loss.zero_terminal_snr is None else loss


def read_metadata(lora: Path) -> dict[str, str]:
    """The file's metadata. Raises InputError for an unreadable file."""
    try:
        with safe_open(str(lora), "pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise InputError(f"{lora}: is not a readable .safetensors file ({error})") from error
