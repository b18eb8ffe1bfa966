"""The training loop, and only the loop: loading, pictures and files are calls."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import UNet2DConditionModel
from torch.optim.lr_scheduler import LRScheduler

from lora_lab.config import Train
from lora_lab.console import bar, say
from lora_lab.errors import RunError
from lora_lab.training.data import TrainingData
from lora_lab.training.loss import Objective, sample_losses
from lora_lab.training.randomness import seed_of


@dataclass(frozen=True)
class Job:
    """One LoRA in training: what learns, how, and until when."""

    unet: UNet2DConditionModel  # with the adapter in it
    optimizer: AcceleratedOptimizer
    schedule: LRScheduler
    settings: Train
    asked: Objective
    steps: int
    batch_size: int
    seed: int

    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def train_steps(
    job: Job,
    data: TrainingData,
    accelerator: Accelerator,
    start: int,
    after_step: Callable[[int, dict[str, float]], None],
) -> int:
    """Do steps start .. job.steps, each followed by `after_step(steps done, numbers)`; returns the steps done.

    Those are fewer when Ctrl-C asked for the end."""
    settings, parts = job.settings, job.settings.gradient_accumulation
    parameters = job.parameters()
    with _stop_on_signal() as stopped, bar(total=job.steps, initial=start, desc="train", unit="step") as shown:
        for step in range(start, job.steps):
            began = time.perf_counter()
            job.unet.train()  # drawing left it in evaluation mode
            torch.manual_seed(seed_of(job.seed, "dropout", step))  # only an adapter's dropout draws from it
            loss = 0.0
            for part in range(parts):
                batch = data.batch(
                    seed=job.seed, step=step, part=part, parts=parts, batch_size=job.batch_size,
                    asked=job.asked, caption_dropout=settings.caption_dropout,
                )  # fmt: skip
                with accelerator.autocast():
                    part_loss = sample_losses(job.unet, job.asked, batch).mean() / parts
                accelerator.backward(part_loss)
                loss += part_loss.item()
            limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
            grad_norm = accelerator.clip_grad_norm_(parameters, limit).item()
            if not math.isfinite(loss):
                raise RunError(
                    f"the loss of step {step + 1} is {loss}: lower lr; the last checkpoint is from before it"
                )
            lr = job.schedule.get_last_lr()[0]
            job.optimizer.step()
            job.schedule.step()
            job.optimizer.zero_grad()
            seconds = time.perf_counter() - began
            shown.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", refresh=False)
            shown.update()
            numbers = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
            numbers |= {"images_per_second": job.batch_size * parts / seconds, "memory_mib": _memory_mib()}
            after_step(step + 1, numbers)
            if stopped():
                return step + 1
    return job.steps


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


def _memory_mib() -> float:
    """Peak memory of the GPU's allocator so far, else what the process holds now, in MiB."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) waits for the end of the step, so that a checkpoint can be written."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        say("stopping after this step (Ctrl-C again stops at once)")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
