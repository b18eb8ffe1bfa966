"""The training loop, and only the loop: loading, pictures and files are calls."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lora_lab.console import bar
from lora_lab.errors import RunError
from lora_lab.stopping import stop_on_signal
from lora_lab.training.data import TrainingData
from lora_lab.training.loss import Batch
from lora_lab.training.prior import PriorData
from lora_lab.training.randomness import seed_of
from lora_lab.training.readings import Readings
from lora_lab.training.step import Job


def train_steps(
    job: Job,
    data: TrainingData,
    prior: PriorData | None,
    start: int,
    report: Callable[[int, dict[str, float]], None],
    after_step: Callable[[int, Callable[[], None]], None],
) -> int:
    """Do steps start .. job.steps; returns the steps done, which are fewer when Ctrl-C asked for the end.

    `report(step, numbers)` is called for every step, on a GPU a little late; `after_step(step, settle)` at once. What
    that does with the weights it does after `settle()`, which waits for all numbers and stops at a bad one."""
    settings, parts = job.settings, job.settings.gradient_accumulation

    # The scaler of float16 expects gradients that overflow: it leaves the update out and scales less.
    finite = {"loss": "loss"} | ({"prior_loss": "prior's loss"} if prior else {})
    finite |= {} if job.scaler.is_enabled() else {"grad_norm": "gradient's norm"}

    def seen(step: int, numbers: dict[str, float]) -> None:
        for key, what in finite.items():
            if not math.isfinite(numbers[key]):
                source = prior if key == "prior_loss" else data
                names = ", ".join(source.names(seed=job.seed, step=step - 1, parts=parts, batch_size=job.batch_size))
                raise RunError(
                    f"the {what} of step {step} is {numbers[key]}, at {names}: lower lr, or look at these pictures; "
                    f"the last checkpoint is from before it"
                )
        shown.set_postfix(loss=f"{numbers['loss']:.4f}", lr=f"{numbers['lr']:.1e}", refresh=False)
        shown.update()
        report(step, numbers)

    readings = Readings(job.batch_size * parts, job.learnt.master.device, seen)
    with stop_on_signal() as stopped, bar(total=job.steps, initial=start, desc="train", unit="step") as shown:
        for step in range(start, job.steps):
            readings.begin()
            if not job.unet.training:  # a measurement left it in evaluation mode; to ask all modules takes 10 ms
                job.mode(training=True)
            torch.manual_seed(seed_of(job.seed, "dropout", step))  # only an adapter's dropout draws from it
            loss = _backward(job, partial(data.batch, caption_dropout=settings.caption_dropout), step)
            # The prior comes after all of the character's batches, whose dropout is then what it is without.
            others = {"prior_loss": _backward(job, prior.batch, step)} if prior else {}
            lr = job.rate()
            readings.put(step + 1, loss, job.update(), lr, **others)
            after_step(step + 1, readings.settle)
            if stopped():
                break
        readings.settle()
        return step + 1 if start < job.steps else job.steps


def _backward(job: Job, batch: Callable[..., Batch], step: int) -> Tensor:
    """Add to the gradient what the batches of step `step` give; returns their loss."""
    loss, parts = torch.zeros((), device=job.learnt.master.device), job.settings.gradient_accumulation
    for part in range(parts):
        loss += job.backward(
            batch(seed=job.seed, step=step, part=part, parts=parts, batch_size=job.batch_size, asked=job.asked)
        )
    return loss


class MetricsFile:
    """metrics.jsonl: one line a step. Going on from a checkpoint drops the lines that come after it."""

    def __init__(self, path: Path, start: int) -> None:
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    return [s for s in path.read_text(encoding="utf-8").splitlines() if s.endswith("}")] if path.is_file() else []
