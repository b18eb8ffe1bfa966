"""A checkpoint: everything needed to resume a training exactly, whole or not there."""

import json
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_lab.adapters.files import START
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.settings.schema import compare_fingerprints
from lora_lab.training.lora_training import LoRATraining

WEIGHTS, STATE, RECORD = "learnt.safetensors", "state.pt", "training.json"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder`/checkpoints, oldest first; a crash leaves names with a leading dot."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if (p / RECORD).is_file())


def save_checkpoint(folder: Path, step: int, training: LoRATraining, fingerprint: dict[str, object]) -> Path:
    """Write checkpoints/step-NNNNNN under a hidden name, rename it, then remove all but the newest few.

    `fingerprint` has the settings and file hashes that a resumed run must share."""
    target = folder / "checkpoints" / f"step-{step:06d}"
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(training.weights(), str(temporary / WEIGHTS))
    # The names again, in the order of average and optimizer state: safetensors sorts them.
    state = {"names": training.parameter_names, "average": training.average} | training.optimizer_state()
    if START in training.network.peft_config:
        state[START] = get_peft_model_state_dict(training.network, adapter_name=START)
    torch.save(state, temporary / STATE)
    record = {"step": step, "recipe": fingerprint}
    (temporary / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for older in checkpoints(folder)[: -training.settings.keep_checkpoints]:
        shutil.rmtree(older)
    return target


def validate_fingerprint(checkpoint: Path, fingerprint: dict[str, object]) -> None:
    """Raise InputError if `checkpoint` was trained with other settings or files than the run that wants to resume from
    it, or has an older format."""
    if not (checkpoint / WEIGHTS).is_file():
        raise InputError(f"resume: {checkpoint} is from an older version of lora_lab: start a new run")
    saved = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))["recipe"]
    comparison = compare_fingerprints(saved, fingerprint)
    if comparison.changed:
        raise InputError(f"resume: {checkpoint} was trained with {comparison.changes}: start a new run for that")
    if comparison.unrecorded:
        keys = ", ".join(comparison.unrecorded)
        say(f"resume: {checkpoint} is from an older version of lora_lab and could not be compared in {keys}")


def load_checkpoint(checkpoint: Path, training: LoRATraining) -> None:
    """Restore `training` from `checkpoint`. Raises InputError if its trainable parameters have other names."""
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    if state["names"] != training.parameter_names:
        raise InputError(
            f"resume: the trainable parameters in {checkpoint} have other names, from another version of diffusers or "
            "peft: install that version, or start a new run"
        )
    if START in training.network.peft_config:  # another machine may have computed other singular vectors
        set_peft_model_state_dict(training.network, state[START], START)
    step = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))["step"]
    training.load_state(load_file(str(checkpoint / WEIGHTS)), state, step)
