"""One LoRA in training: its parameters, gradient clipping, optimizer, schedule and checkpoints.

All trainable parameters lie in one piece of memory: gradient clipping and the optimizer launch a few kernels instead
of thousands. A checkpoint has everything needed to resume exactly, whole or not there. Its record has the checksums of
its parts, so a damaged one is recognized, and an older one is taken in its place."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lora_lab.adapters.files import START
from lora_lab.console import say
from lora_lab.errors import InputError, RunError
from lora_lab.runs import disk_full_named, display_path, hash_content, hash_text, signals_deferred, sync
from lora_lab.settings.schema import Schedule, Train, compare_fingerprints
from lora_lab.training.loss import Objective
from lora_lab.training.text_encoders import TrainableTextEncoders

# Of a checkpoint: its files, and the key of the record that has their checksums.
WEIGHTS, STATE, RECORD = "learnt.safetensors", "state.pt", "training.json"
CHECKSUMS = "sha256"


class FlatParams:
    """Parameters laid end to end, N numbers in all.

    `model_copy` (N,) is what the model computes with, in the model's precision. `master` (N,) is what the optimizer
    updates, in float32: half precision would round most updates away. For a float32 model both are the same memory.
    The parameters stay in the model and become views of `model_copy`; so do their gradients, which `accumulate_grads`
    adds to the master's gradient in float32."""

    def __init__(self, params: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        """Take over `params`, whose model computes in `dtype`."""
        self.params = list(params)
        self.master = nn.Parameter(torch.cat([p.detach().float().reshape(-1) for p in self.params]))
        self.model_copy = self.master.detach().to(dtype)  # the same memory for float32
        self._gradient = torch.zeros_like(self.model_copy)
        self._same_memory = dtype == torch.float32
        self.master.grad = self._gradient if self._same_memory else torch.zeros_like(self.master)
        self._point_params_at(self.model_copy, self._gradient)

    def views(self, flat: Tensor) -> list[Tensor]:
        """`flat` (N,) split into views of the parameters' shapes."""
        pieces = flat.detach().split([p.numel() for p in self.params])
        return [piece.view_as(p) for piece, p in zip(pieces, self.params, strict=True)]

    def matrices(self) -> list[nn.Parameter]:
        """The master as one parameter of each original shape, for an optimizer that must know shapes."""
        return list(map(_with_grad, self.views(self.master), self.views(self.master.grad)))

    def as_parameter(self, start: int, shape: tuple[int, ...]) -> nn.Parameter:
        """The numbers from `start` on as one more parameter (1, *shape): neighbours seen as one.

        It shares memory with the model's copy, and its gradient with theirs."""
        end = start + math.prod(shape)
        return _with_grad(self.model_copy[start:end].view(1, *shape), self._gradient[start:end].view(1, *shape))

    def split(self, counts: Sequence[int]) -> list[nn.Parameter]:
        """The master as one flat parameter per group: the first counts[0] parameters, the next counts[1], and so on."""
        remaining = iter(self.params)
        sizes = [sum(p.numel() for p in islice(remaining, count)) for count in counts]
        return list(map(_with_grad, self.master.detach().split(sizes), self.master.grad.split(sizes)))

    def accumulate_grads(self) -> None:
        """Add the gradients of a backward pass to the master's, and set the model's to zero for the next one."""
        if not self._same_memory:
            self.master.grad.add_(self._gradient)
            self._gradient.zero_()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Scale the master's gradient down to `max_norm` where it is longer; None leaves it.

        Returns the norm () before clipping, without waiting for the device."""
        norm = torch.linalg.vector_norm(self.master.grad)
        if max_norm is not None:
            self.master.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """After an update: copy the master to the model, and set its gradient to zero for the next step."""
        if not self._same_memory:
            self.model_copy.copy_(self.master)
        self.master.grad.zero_()

    @torch.no_grad()
    def load_(self, values: Tensor) -> None:
        """Overwrite master and model copy with `values` (N,). Gradients stay."""
        self.master.copy_(values)
        self.model_copy.copy_(self.master)

    @contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Within the context the model's parameters are the float32 master, so that weights can be loaded exactly."""
        if self._same_memory:
            yield
            return
        try:
            self._point_params_at(self.master, None)
            yield
        finally:
            self._point_params_at(self.model_copy, self._gradient)
            with torch.no_grad():
                self.model_copy.copy_(self.master)

    def _point_params_at(self, flat: Tensor, gradient: Tensor | None) -> None:
        gradients = [None] * len(self.params) if gradient is None else self.views(gradient)
        for parameter, view, grad in zip(self.params, self.views(flat), gradients, strict=True):
            parameter.grad = None  # torch refuses a gradient of another dtype than the data
            parameter.data = view
            parameter.grad = grad


def _with_grad(data: Tensor, gradient: Tensor) -> nn.Parameter:
    """A parameter in the memory of `data`, whose gradient lies in that of `gradient`."""
    parameter = nn.Parameter(data)
    parameter.grad = gradient
    return parameter


@dataclass(frozen=True)
class Update:
    """What is known of one update; nothing here waits for the device."""

    grad_norm: Tensor  # () before clipping
    lr: float  # that the optimizer used, times the distance that Prodigy has estimated


@dataclass
class LoRATraining:
    """One LoRA in training. `network` holds the adapter; an engine does the forward and backward passes on it.

    Two runs share one training where one of them is the other's beginning (a sweep over steps)."""

    network: nn.Module
    network_name: str  # of the base's component
    params: FlatParams
    optimizer: torch.optim.Optimizer  # of params.master, as one tensor, by groups or matrix by matrix
    optimizer_averages: bool  # it keeps an average of the weights: eval() switches to it, train() back
    schedule: LRScheduler
    scaler: torch.amp.GradScaler  # of the loss; enabled for float16 alone
    settings: Train
    objective: Objective
    batch_size: int
    seed: int
    average: Tensor | None = None  # (N,) moving average of params.master; None without stage.ema_decay
    text_encoders: TrainableTextEncoders | None = None
    freeze_after: Sequence[tuple[Tensor, int]] = ()  # views of the gradient, and the step after which each is frozen
    captures: bool = False  # whether its step may be captured as a CUDA graph
    step: int = 0  # updates done
    mid_update: bool = False  # an update was interrupted: the state is that of no step

    @property
    def components(self) -> dict[str, nn.Module]:
        """The modules that run inside a step, by their names in the base."""
        return {self.network_name: self.network} | (self.text_encoders.encoders if self.text_encoders else {})

    @property
    def adapted_components(self) -> dict[str, nn.Module]:
        """The components with an adapter in training."""
        return {name: module for name, module in self.components.items() if getattr(module, "peft_config", None)}

    @cached_property
    def parameter_names(self) -> list[str]:
        """Names of all trainable parameters, in the order of `params`: unet.down_blocks.1..., text_encoder...."""
        names = {
            parameter: f"{component}.{name}"
            for component, module in self.components.items()
            for name, parameter in module.named_parameters()
        }
        return [names[parameter] for parameter in self.params.params]

    def weights(self) -> dict[str, Tensor]:
        """The trainable parameters in float32 by name. On a CPU these are views of the master, on a GPU one copy."""
        master = self.params.master.detach()
        if master.is_cuda:  # a copy to pinned memory, which torch keeps for the next time, is many times as fast
            master = torch.empty(master.shape, pin_memory=True).copy_(master)
        return dict(zip(self.parameter_names, self.params.views(master.cpu()), strict=True))

    def is_finite(self) -> bool:
        """Whether all weights, and their moving average, are finite; waits for the device."""
        kept = [self.params.master] if self.average is None else [self.params.master, self.average]
        return all(bool(flat.isfinite().all()) for flat in kept)

    def train(self, mode: bool = True) -> None:
        """Set all components to training mode (dropout, gradient checkpointing) or, with False, to evaluation mode."""
        for module in self.components.values():
            module.train(mode)

    def current_lr(self) -> float:
        """The learning rate of the next update, times the distance that Prodigy has estimated so far."""
        group = self.optimizer.param_groups[0]
        return group["lr"] * group.get("d", 1.0)

    def clip_and_update(self) -> Update:
        """Clip the gradient, let the optimizer and the schedule do one step, and update the moving average.

        The model computes with the new weights after the engine's `sync_weights`."""
        self.mid_update = True
        lr = self.current_lr()
        self.scaler.unscale_(self.optimizer)
        for gradient, last_step in self.freeze_after:
            if self.schedule.last_epoch >= last_step:  # a frozen part's gradient must not count in clipping
                gradient.zero_()
        grad_norm = self.params.clip_grad_norm(self.settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            with torch.no_grad():
                decay = ema_decay(self.settings.ema_decay, self.schedule.last_epoch)
                self.average.lerp_(self.params.master, 1 - decay)
        self.schedule.step()
        self.step += 1
        self.mid_update = False
        return Update(grad_norm, lr)

    @contextmanager
    def swap_in_saved_weights(self) -> Iterator[None]:
        """Within the context the weights are those that are saved and rendered; afterwards they are bit-identical to
        before.

        The two differ where an average is kept: `average`, or one inside a schedule-free optimizer."""
        if not self.optimizer_averages and self.average is None:
            yield
            return
        current = self.params.master.detach().clone()
        if self.optimizer_averages:
            self.optimizer.eval()
        self.params.load_(self.params.master if self.average is None else self.average)
        try:
            yield
        finally:
            if self.optimizer_averages:
                self.optimizer.train()
            self.params.load_(current)  # the optimizer's own way back is a sum, which rounds

    def optimizer_state(self) -> dict[str, dict]:
        """The state of optimizer, schedule and scaler by name, as a checkpoint keeps it."""
        parts = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state(self, weights: Mapping[str, Tensor], state: Mapping[str, dict | Tensor | None], step: int) -> None:
        """Restore what `weights`, `optimizer_state` and `average` were after `step` updates."""
        self.params.load_(torch.cat([weights[name].reshape(-1) for name in self.parameter_names]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.copy_(state["average"])
        self.step = step


def ema_decay(max_decay: float, updates: int) -> float:
    """The share of the moving average that the update after `updates` others keeps:
    min(max_decay, (1 + updates) / (10 + updates)).

    The beginning is soon forgotten. Source: TensorFlow's ExponentialMovingAverage with num_updates."""
    return min(max_decay, (1 + updates) / (10 + updates))


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, settings: Schedule, steps: int, freeze_after: Sequence[int | None] = ()
) -> LRScheduler:
    """The learning-rate schedule of `optimizer` over `steps`, by its name in diffusers.

    `freeze_after` has, for each parameter group, the step from which its learning rate is 0, or None."""
    schedule = get_scheduler(
        settings.name,
        optimizer,
        num_warmup_steps=settings.warmup_steps(steps),
        num_training_steps=steps,
        num_cycles=settings.cycles,
        power=settings.power,
    )
    for i, last_step in enumerate(freeze_after):
        if last_step is not None:
            schedule.lr_lambdas[i] = _zero_from(schedule.lr_lambdas[i], last_step)
    return schedule


def _zero_from(factor: Callable[[int], float], last_step: int) -> Callable[[int], float]:
    return lambda step: factor(step) if step < last_step else 0.0


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
                say(f"{display_path(damaged)} is damaged ({why}): {checkpoint.name} is taken in its place")
            return checkpoint
        damages[checkpoint] = reason
    if damages:
        reasons = "; ".join(f"{damaged.name}: {why}" for damaged, why in damages.items())
        place = display_path(folder / "checkpoints")
        raise InputError(f"resume: no checkpoint in {place} is whole ({reasons}): start a new run")
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
            with signals_deferred():
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
    name = display_path(checkpoint)
    if not (checkpoint / WEIGHTS).is_file():
        raise InputError(f"resume: {name} is from an older version of lora_lab: start a new run")
    record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    comparison = compare_fingerprints(record["recipe"], fingerprint)
    if comparison.changed:
        raise InputError(f"resume: {name} was trained with {comparison.changes}: start a new run for that")
    older = f"resume: {name} is from an older version of lora_lab and"
    if comparison.unrecorded:
        say(f"{older} could not be compared in {', '.join(comparison.unrecorded)}")
    if CHECKSUMS not in record:
        say(f"{older} has no checksums: it is not verified")


def load_checkpoint(checkpoint: Path, training: LoRATraining) -> None:
    """Restore `training` from `checkpoint`. Raises InputError if its trainable parameters have other names."""
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    if state["names"] != training.parameter_names:
        raise InputError(
            f"resume: the trainable parameters in {display_path(checkpoint)} have other names, from another version of "
            "diffusers or peft: install that version, or start a new run"
        )
    if START in training.network.peft_config:  # another machine may have computed other singular vectors
        set_peft_model_state_dict(training.network, state[START], START)
    step = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))["step"]
    training.load_state(load_file(str(checkpoint / WEIGHTS)), state, step)
