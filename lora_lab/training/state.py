"""A checkpoint: everything needed to go on exactly, whole or not there."""

import json
import shutil
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lora_lab.errors import InputError


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under `folder`/checkpoints, oldest first; a crash leaves only names with a dot in front."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if (p / "training.json").is_file())


def save_checkpoint(
    folder: Path,
    step: int,
    unet: nn.Module,
    optimizer: AcceleratedOptimizer,
    schedule: LRScheduler,
    recipe: dict,
    keep: int,
) -> Path:
    """Write checkpoints/step-NNNNNN under a hidden name, rename it, then drop all but the newest `keep`.

    `recipe` is what a run that goes on must have in common with this one."""
    target = folder / "checkpoints" / f"step-{step:06d}"
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    adapter = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    save_file(adapter, str(temporary / "adapter.safetensors"))
    scaler = optimizer.scaler.state_dict() if optimizer.scaler is not None else None
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "scaler": scaler}
    torch.save(state, temporary / "optimizer.pt")
    (temporary / "training.json").write_text(json.dumps({"step": step, "recipe": recipe}, indent=2), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for older in checkpoints(folder)[:-keep]:
        shutil.rmtree(older)
    return target


def refuse_other_recipe(checkpoint: Path, recipe: dict) -> None:
    """Raise InputError if `checkpoint` was trained by another recipe than the run that wants to go on from it."""
    saved = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["recipe"]
    for key, value in recipe.items():
        if saved.get(key) != value:
            was = saved.get(key)
            raise InputError(
                f"resume: {checkpoint} was trained with {key}={was}, not {value}: start a new run for that"
            )


def load_checkpoint(checkpoint: Path, unet: nn.Module, optimizer: AcceleratedOptimizer, schedule: LRScheduler) -> int:
    """Restore what learns; returns the number of steps done."""
    set_peft_model_state_dict(unet, load_file(str(checkpoint / "adapter.safetensors")))
    state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    if optimizer.scaler is not None and state["scaler"]:
        optimizer.scaler.load_state_dict(state["scaler"])
    return json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["step"]
