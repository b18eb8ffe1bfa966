"""A checkpoint: everything needed to go on exactly, whole or not there."""

import json
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_lab.adapters.files import START
from lora_lab.errors import InputError
from lora_lab.training.step import Job

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
    with job.learnt.exact():
        adapter = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(job.unet).items()}
    save_file(adapter, str(temporary / "adapter.safetensors"))
    if job.read is not None:
        with job.learnt.exact():
            text = {name: p.detach().cpu().clone() for name, p in _text(job).items()}
        save_file(text, str(temporary / "text.safetensors"))
    if START in job.unet.peft_config:
        start = get_peft_model_state_dict(job.unet, adapter_name=START)
        save_file({k: v.detach().cpu().contiguous() for k, v in start.items()}, str(temporary / "start.safetensors"))
    state = {part: getattr(job, part).state_dict() for part in STATEFUL} | {"average": job.average}
    torch.save(state, temporary / "optimizer.pt")
    (temporary / "training.json").write_text(json.dumps({"step": step, "recipe": recipe}, indent=2), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for older in checkpoints(folder)[: -job.settings.keep_checkpoints]:
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


def load_checkpoint(checkpoint: Path, job: Job) -> int:
    """Restore what learns; returns the number of steps done."""
    with job.learnt.exact():
        set_peft_model_state_dict(job.unet, load_file(str(checkpoint / "adapter.safetensors")))
    if job.read is not None:
        text = load_file(str(checkpoint / "text.safetensors"))
        with job.learnt.exact(), torch.no_grad():
            for name, parameter in _text(job).items():
                parameter.copy_(text[name])
    if START in job.unet.peft_config:  # another machine may have found other singular vectors
        set_peft_model_state_dict(job.unet, load_file(str(checkpoint / "start.safetensors")), START)
    state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    for part in STATEFUL:
        getattr(job, part).load_state_dict(state[part])
    if job.average is not None:
        job.average.copy_(state["average"])
    return json.loads((checkpoint / "training.json").read_text(encoding="utf-8"))["step"]


def _text(job: Job) -> dict[str, torch.nn.Parameter]:
    """What learns of the text encoders."""
    return {
        f"{part}.{name}": parameter
        for part, encoder in job.read.encoders.items()
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad
    }
