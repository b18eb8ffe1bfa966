"""A checkpoint: everything needed to go on exactly, whole or not there."""

import json
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_lab.adapters.files import START
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.settings.decides import compare_fingerprints
from lora_lab.training.step import Job

LEARNT = "learnt.safetensors"
STATEFUL = ("optimizer", "schedule", "scaler")  # of a job, beside what is learnt


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under `folder`/checkpoints, oldest first; a crash leaves only names with a dot in front."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if (p / "training.json").is_file())


def save_checkpoint(folder: Path, step: int, job: Job, recipe: dict) -> Path:
    """Write checkpoints/step-NNNNNN under a hidden name, rename it, then drop all but the newest few.

    `recipe` is what a run that goes on must have in common with this one."""
    target = folder / "checkpoints" / f"step-{step:06d}"
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(job.state(), str(temporary / LEARNT))
    # The names once more, in the order that average and optimizer have: safetensors sorts them.
    state = {"names": job.names, "average": job.average} | {part: getattr(job, part).state_dict() for part in STATEFUL}
    if START in job.unet.peft_config:
        state[START] = get_peft_model_state_dict(job.unet, adapter_name=START)
    torch.save(state, temporary / "state.pt")
    (temporary / "training.json").write_text(json.dumps({"step": step, "recipe": recipe}, indent=2), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for older in checkpoints(folder)[: -job.settings.keep_checkpoints]:
        shutil.rmtree(older)
    return target


def validate_fingerprint(checkpoint: Path, recipe: dict) -> None:
    """Raise InputError if `checkpoint` was trained by another recipe than the run that wants to go on from it, or is of
    a form from before."""
    if not (checkpoint / LEARNT).is_file():
        raise InputError(f"resume: {checkpoint} is from an older version of lora_lab: start a new run")
    saved = json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["recipe"]
    comparison = compare_fingerprints(saved, recipe)
    if comparison.changed:
        raise InputError(f"resume: {checkpoint} was trained with {comparison.changes}: start a new run for that")
    if comparison.unrecorded:
        keys = ", ".join(comparison.unrecorded)
        say(f"resume: {checkpoint} is from an older version of lora_lab and could not be compared in {keys}")


def load_checkpoint(checkpoint: Path, job: Job) -> int:
    """Restore what learns; returns the number of steps done. Raises InputError if something else learnt there."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    if state["names"] != job.names:
        raise InputError(
            f"resume: what learns has other names in {checkpoint}, from another version of diffusers or peft: "
            "install that, or start a new run"
        )
    learnt = load_file(str(checkpoint / LEARNT))
    job.learnt.become(torch.cat([learnt[name].reshape(-1) for name in job.names]))
    if START in job.unet.peft_config:  # another machine may have found other singular vectors
        set_peft_model_state_dict(job.unet, state[START], START)
    for part in STATEFUL:
        getattr(job, part).load_state_dict(state[part])
    if job.average is not None:
        job.average.copy_(state["average"])
    return json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["step"]
