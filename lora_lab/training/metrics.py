"""The numbers of a run: metrics.jsonl, the tracker, and the check that they are finite.

They are read once they have arrived from the device, so that no step waits."""

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import psutil
import torch
from torch import Tensor

from lora_lab.board.read import loss_plot, read_metrics
from lora_lab.console import say
from lora_lab.errors import DiskFullError, RunError
from lora_lab.runs import disk_full_named, display_path, write_text
from lora_lab.track.base import Track
from lora_lab.training.lora_training import LoRATraining, Update
from lora_lab.training.resolve import METRICS, VALIDATION

MAX_PENDING = 2  # steps whose numbers a GPU may not have delivered yet


@dataclass(frozen=True)
class _Pending:
    step: int
    lr: float
    names: tuple[str, ...]  # of the values
    values: Tensor  # losses and gradient norm, on the CPU once `done`
    done: torch.cuda.Event | float  # on a CPU the time in seconds


class AsyncMetrics:
    """Calls `report(step, metrics)` for every step, in order and on a GPU a little late; `flush` waits for all.

    The time of a step is that between two steps' ends on the device, whenever they are read."""

    def __init__(self, images: int, device: torch.device, report: Callable[[int, dict[str, float]], None]) -> None:
        """`images` are those of one step."""
        self._images, self._on_gpu, self._report = images, device.type == "cuda", report
        self._pending: deque[_Pending] = deque()
        self._last_end = self._now()

    def start_step(self) -> None:
        """A step starts: the time since the last one (rendering, saving) is not part of its own."""
        if not self._pending:
            self._last_end = self._now()

    def push(self, step: int, losses: Mapping[str, Tensor], grad_norm: Tensor, lr: float) -> None:
        """Hand over the losses () and the gradient norm () of `step`, which the device may not have finished yet."""
        scalars = {**losses, "grad_norm": grad_norm}
        values = torch.stack(list(scalars.values()))
        if self._on_gpu:
            values = torch.empty(len(scalars), pin_memory=True).copy_(values, non_blocking=True)
        self._pending.append(_Pending(step, lr, tuple(scalars), values, self._now()))
        while len(self._pending) > (MAX_PENDING if self._on_gpu else 0):
            self._read()

    def flush(self) -> None:
        """Report every step that was pushed."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        pending = self._pending.popleft()
        if self._on_gpu:
            pending.done.synchronize()
            seconds = self._last_end.elapsed_time(pending.done) / 1000
        else:
            seconds = pending.done - self._last_end
        self._last_end = pending.done
        metrics = dict(zip(pending.names, pending.values.tolist(), strict=True))
        metrics |= {"lr": pending.lr, "grad_norm": metrics.pop("grad_norm")}  # in reading order: losses, lr, norm
        metrics |= {"images_per_second": self._images / seconds, "memory_mib": memory_mib()}
        self._report(pending.step, metrics)

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def memory_mib() -> float:
    """Peak memory in MiB of the GPU's allocator so far; without a GPU what the process holds now."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20


@dataclass
class StepMetrics:
    """Writes the numbers of every step of one run, and stops it where they are not finite."""

    training: LoRATraining
    tracker: Track
    file: "MetricsFile"
    image_names: Callable[[str, int], list[str]]  # of a loss and a step: the images of the step
    latest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images = self.training.batch_size * self.training.settings.gradient_accumulation
        self._pending = AsyncMetrics(images, self.training.params.master.device, self._report)

    def start_step(self) -> None:
        """A step starts: what was done since the last one is not part of its time."""
        self._pending.start_step()

    def push(self, step: int, losses: Mapping[str, Tensor], update: Update) -> None:
        """Hand over the numbers of `step`, which the device may not have computed yet."""
        self._pending.push(step, losses, update.grad_norm, update.lr)

    def flush(self) -> None:
        """Wait for all numbers, and until they are on the disk. Raises RunError for one that is not finite."""
        self._pending.flush()
        self.file.sync()

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        self._refuse_not_finite(step, metrics)
        self.file.write(step, metrics)
        self.tracker.numbers(step, {f"train/{name}": value for name, value in metrics.items()})
        self.latest = metrics

    def _refuse_not_finite(self, step: int, metrics: dict[str, float]) -> None:
        names = {"loss": "loss", "prior_loss": "prior loss"}
        if not self.training.scaler.is_enabled():  # it expects gradients that overflow: it skips the update
            names["grad_norm"] = "gradient norm"
        for key, name in names.items():
            if not math.isfinite(metrics.get(key, 0.0)):
                images = ", ".join(self.image_names(key, step - 1))
                raise RunError(
                    f"the {name} of step {step} is {metrics[key]}, at {images}: lower lr, or look at these images; "
                    "the last checkpoint is from before this step"
                )


@dataclass
class MetricsFile:
    """A file of one JSON line per step, open for appending."""

    path: Path
    steps: set[int]  # that have a line
    stream: TextIO

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the line of `step`. Raises DiskFullError."""
        with disk_full_named(self.path):
            self.stream.write(json.dumps({"step": step, **metrics}) + "\n")
        self.steps.add(step)

    def sync(self) -> None:
        """Wait until all lines are on the disk: a checkpoint of a step must not outlive the line of that step."""
        with disk_full_named(self.path):
            self.stream.flush()
            os.fsync(self.stream.fileno())


def open_metrics_file(path: Path, last_step: int) -> MetricsFile:
    """Open `path` for appending, without its lines after `last_step`: those after a checkpoint are written again."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    steps = [_step_of(line) for line in lines]
    if damaged := [i for i, step in enumerate(steps[:-1], 1) if step is None]:  # the last may be half of one
        numbers = ", ".join(map(str, damaged))
        say(f"{display_path(path)} is damaged in line {numbers}, which the plot of the loss will lack")
    kept = {step: line for step, line in zip(steps, lines, strict=True) if step is not None and step <= last_step}
    write_text(path, "".join(line + "\n" for line in kept.values()))
    return MetricsFile(path, set(kept), path.open("a", encoding="utf-8", buffering=1))


def _step_of(line: str) -> int | None:
    """The step of a line; None if the line is damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


@contextmanager
def metrics_files(folder: Path, last_step: int, validation: bool) -> Iterator[tuple[MetricsFile, MetricsFile | None]]:
    """Within the context metrics.jsonl and, with `validation`, validation.jsonl of a run after `last_step` steps.

    At its end they are plotted as loss.png."""
    metrics = open_metrics_file(folder / METRICS, last_step)
    measurements = open_metrics_file(folder / VALIDATION, last_step or -1) if validation else None

    def close_and_plot() -> None:
        for file in filter(None, (metrics, measurements)):
            file.stream.close()
        measured = read_metrics(folder / VALIDATION) if validation else []
        loss_plot(read_metrics(folder / METRICS), measured, folder / "loss.png")

    try:
        yield metrics, measurements
    except BaseException:
        with suppress(OSError, DiskFullError):  # what ended the run is reported
            close_and_plot()
        raise
    close_and_plot()


def mean_loss(folder: Path, steps: int = 50) -> float:
    """The mean loss of the last `steps` lines of metrics.jsonl."""
    return statistics.mean(line["loss"] for line in read_metrics(folder / METRICS)[-steps:])


def last_validation_loss(folder: Path) -> float:
    """The newest measurement in validation.jsonl."""
    return read_metrics(folder / VALIDATION)[-1]["loss"]
