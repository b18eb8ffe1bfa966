"""The LoRA file: kohya's keys, which diffusers, ComfyUI, AUTOMATIC1111, Forge and kohya's tools all load."""

import json
import re
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab.config import Loss
from lora_lab.errors import InputError
from lora_lab.runs import write_atomically

PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
SUFFIX = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}


def kohya_state(parts: dict[str, nn.Module], adapter: str = "default") -> dict[str, Tensor]:
    """The LoRA of `parts` ("unet", "text_encoder", "text_encoder_2" -> module with a peft adapter) in kohya's keys.

    alpha is scaling * r, so alpha != rank and rsLoRA come out right: readers compute scaling as alpha / r.
    Each part has one alpha, since diffusers drops differing ones; where a pattern sets more, the up matrices take it.
    transformers 5 dropped "text_model." from the first encoder's names; every other program expects it.
    Raises InputError for what the format does not know (DoRA's magnitudes, biases)."""
    state = {}
    for part, model in parts.items():
        common = None
        for key, value in get_peft_model_state_dict(model, adapter_name=adapter).items():
            suffix = next((s for s in SUFFIX if key.endswith(s)), None)
            if suffix is None:
                raise InputError(f"adapter: {key} has no place in a LoRA file, only LoRA matrices do: see conf/adapter")
            module = key.removesuffix(suffix)
            layer = model.get_submodule(module)
            alpha = float(layer.scaling[adapter] * layer.r[adapter])
            common = common or alpha
            if suffix == ".lora_B.weight":
                value = value * (alpha / common)
            if part != "unet" and not module.startswith("text_model."):
                module = "text_model." + module
            name = f"{PREFIX[part]}_{module.replace('.', '_')}"
            state[name + SUFFIX[suffix]] = value.detach().cpu().contiguous()
            state[name + ".alpha"] = torch.tensor(common)
    return state


def metadata(
    *, name: str, base: str, trigger: str, rank: int, alpha: float, lr: float, steps: int, batch_size: int, seed: int,
    resolution: int, captions: list[str], loss: Loss, dataset_hash: str, base_hash: str,
) -> dict[str, str]:  # fmt: skip
    """What other programs show of the file; every value is a string, as safetensors asks. `loss` is settled.

    `ss_*` are kohya's keys: Forge lists a file for SDXL only if ss_base_model_version starts with "sdxl_", and offers
    the words of ss_tag_frequency. `modelspec.*` is Stability's specification 1.0.0."""
    from lora_lab import __version__

    masked = "" if loss.masks == "none" else f", masks: {loss.masks}"
    huber = loss.type in ("huber", "smooth_l1")
    words: dict[str, int] = {}
    for caption in captions:
        for phrase in filter(None, (p.strip() for p in caption.split(","))):
            words[phrase] = words.get(phrase, 0) + 1
    return {
        "ss_output_name": name,
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": base,
        "ss_sd_model_hash": base_hash,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
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
        "ss_tag_frequency": json.dumps({trigger: words}, ensure_ascii=False),
        "ss_training_comment": f"lora_lab {__version__}, dataset {dataset_hash}{masked}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": "v" if loss.prediction == "v_prediction" else "epsilon",
        "modelspec.timestep_range": f"{loss.min_timestep},{loss.max_timestep}",
    }


def save_lora(path: Path, state: dict[str, Tensor], dtype: torch.dtype, notes: dict[str, str]) -> Path:
    """Write `state` in `dtype` (alphas stay float32: they are exact numbers) with `notes` as metadata, atomically."""
    cast = {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in state.items()}
    return write_atomically(path, lambda file: save_file(cast, str(file), metadata=notes))


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files hold the same LoRA. Their bytes may differ: safetensors writes metadata in no fixed order."""
    try:
        mine, theirs = load_file(str(one)), load_file(str(other))
    except SafetensorError:
        return False
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def keep_older(path: Path) -> Path | None:
    """Give what stands at `path` a free number (NAME.1.safetensors), so that a new file can take the name."""
    if not path.exists():
        return None
    numbered = re.compile(rf"{re.escape(path.stem)}\.(\d+){path.suffix}")
    numbers = [int(found[1]) for file in path.parent.iterdir() if (found := numbered.fullmatch(file.name))]
    older = path.with_name(f"{path.stem}.{max(numbers, default=0) + 1}{path.suffix}")
    path.rename(older)
    return older
