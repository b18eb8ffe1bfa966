"""A checkpoint: everything needed to resume a training exactly, whole or not there.

Its record has the checksums of its parts, so a damaged one is recognized, and an older one is taken in its place."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_lab.adapters.files import START
from lora_lab.console import say
from lora_lab.errors import InputError, RunError
from lora_lab.runs import disk_full_named, hash_content, hash_text, sync
from lora_lab.settings.schema import compare_fingerprints
from lora_lab.training.lora_training import LoRATraining

WEIGHTS, STATE, RECORD = "learnt.safetensors", "state.pt", "training.json"
CHECKSUMS = "sha256"  # key of the record


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of the run in `folder`, oldest first. Names with a leading dot are incomplete."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of steps after which `checkpoint` was written."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of the run in `folder`; None if it has none yet. Newer ones that are damaged are
    printed.

    Raises InputError if all are damaged."""
    damages: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(folder)):
        reason = damage(checkpoint)
        if reason is None:
            for damaged, why in damages.items():
                say(f"{damaged} is damaged ({why}): {checkpoint.name} is taken in its place")
            return checkpoint
        damages[checkpoint] = reason
    if damages:
        reasons = "; ".join(f"{damaged.name}: {why}" for damaged, why in damages.items())
        raise InputError(f"resume: no checkpoint in {folder / 'checkpoints'} is whole ({reasons}): start a new run")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of `checkpoint`, in a few words; None if it is whole."""
    try:
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
        if record["step"] != step_of(checkpoint):
            return f"{RECORD} is about step {record['step']!s:.20}"
        if not isinstance(record["recipe"], dict):
            return f"{RECORD} cannot be read"
        if CHECKSUMS not in record:
            return _damage_of_unverified(checkpoint)
        checksums = _checksums(checkpoint, record)
        wrong = [name for name, checksum in checksums.items() if record[CHECKSUMS].get(name) != checksum]
    except OSError as error:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{RECORD} cannot be read"
    return f"{', '.join(wrong)} changed since it was written" if wrong else None


def _checksums(checkpoint: Path, record: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of each part, and of what `record` says beside its checksums."""
    content = json.dumps([record["step"], record["recipe"]], sort_keys=True)
    return {name: hash_content(checkpoint / name) for name in (WEIGHTS, STATE)} | {RECORD: hash_text(content)}


def _damage_of_unverified(checkpoint: Path) -> str | None:
    """`damage` of a checkpoint from a version that wrote no checksums: whether its files can be read."""
    if not (checkpoint / WEIGHTS).exists() and any(checkpoint.glob("*.safetensors")):
        return None  # of a format that validate_fingerprint refuses
    for name in (WEIGHTS, STATE):
        try:
            if name == STATE:
                torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
            elif not all(weights.isfinite().all() for weights in load_file(str(checkpoint / WEIGHTS)).values()):
                return f"{WEIGHTS} has values that are not finite"
        except Exception:  # torch and pickle raise nearly anything for a damaged file
            return f"{name} cannot be read"
    return None


def save_checkpoint(folder: Path, step: int, training: LoRATraining, fingerprint: dict[str, object]) -> Path:
    """Write checkpoints/step-NNNNNN, unless a whole one is there.

    `fingerprint` has the settings and file hashes that a resumed run must share. Raises RunError for weights that are
    not finite, DiskFullError."""
    if not training.is_finite():
        raise RunError(
            f"the LoRA after step {step} has values that are not finite, and is not saved: use a lower lr; the last "
            "checkpoint is from before this step"
        )
    target = folder / "checkpoints" / f"step-{step:06d}"
    if not target.is_dir() or damage(target) is not None:
        _write(target, step, training, fingerprint)
    return target


def remove_older(folder: Path, step: int, kept: int) -> None:
    """Remove the checkpoints before that of `step`, but the newest, so that `kept` are left with it."""
    older = [checkpoint for checkpoint in checkpoints(folder) if step_of(checkpoint) < step]
    for checkpoint in older[: max(0, len(older) + 1 - kept)]:
        _remove(checkpoint)


def _write(target: Path, step: int, training: LoRATraining, fingerprint: dict[str, object]) -> None:
    """Write a checkpoint under a hidden name and rename it, so that a visible one is complete; whatever fails, nothing
    hidden is left."""
    remove_incomplete(target.parent)
    temporary = target.with_name(f".{target.name}")
    try:
        with disk_full_named(target):
            temporary.mkdir(parents=True)
            save_file(training.weights(), str(temporary / WEIGHTS))
            # The names again, in the order of average and optimizer state: safetensors sorts them.
            state = {"names": training.parameter_names, "average": training.average} | training.optimizer_state()
            if START in training.network.peft_config:
                state[START] = get_peft_model_state_dict(training.network, adapter_name=START)
            with (temporary / STATE).open("wb") as file:  # of a path, torch's errors do not say that the disk is full
                torch.save(state, file)
            record = json.loads(json.dumps({"step": step, "recipe": fingerprint}))  # as it will be read
            record[CHECKSUMS] = _checksums(temporary, record)
            (temporary / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            if target.exists():
                _remove(target)  # it is damaged
            temporary.rename(target)
            sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint: first its name, since without some of its files it would look damaged."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def remove_incomplete(folder: Path) -> None:
    """Remove what a killed process left in the checkpoints' `folder`."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def validate_fingerprint(checkpoint: Path, fingerprint: dict[str, object]) -> None:
    """Raise InputError if `checkpoint` was trained with other settings or files than the run that wants to resume from
    it, or has an older format."""
    if not (checkpoint / WEIGHTS).is_file():
        raise InputError(f"resume: {checkpoint} is from an older version of lora_lab: start a new run")
    record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    comparison = compare_fingerprints(record["recipe"], fingerprint)
    if comparison.changed:
        raise InputError(f"resume: {checkpoint} was trained with {comparison.changes}: start a new run for that")
    older = f"resume: {checkpoint} is from an older version of lora_lab and"
    if comparison.unrecorded:
        say(f"{older} could not be compared in {', '.join(comparison.unrecorded)}")
    if CHECKSUMS not in record:
        say(f"{older} has no checksums: it is not verified")


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
