"""The training loop, and only the loop: loading, pictures and files are calls."""

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_lab.console import bar, say
from lora_lab.errors import RunError
from lora_lab.training.data import TrainingData
from lora_lab.training.randomness import seed_of
from lora_lab.training.readings import Readings
from lora_lab.training.step import Job


def train_steps(
    job: Job,
    data: TrainingData,
    start: int,
    report: Callable[[int, dict[str, float]], None],
    after_step: Callable[[int, Callable[[], None]], None],
) -> int:
    """Do steps start .. job.steps; returns the steps done, which are fewer when Ctrl-C asked for the end.

    `report(step, numbers)` is called for every step, on a GPU a little late; `after_step(step, settle)` at once. What
    that does with the weights it does after `settle()`, which waits for all numbers and stops at a bad one."""
    settings, parts = job.settings, job.settings.gradient_accumulation

    # The scaler of float16 expects gradients that overflow: it leaves the update out and scales less.
    finite = {"loss": "loss"} if job.scaler.is_enabled() else {"loss": "loss", "grad_norm": "gradient's norm"}

    def seen(step: int, numbers: dict[str, float]) -> None:
        for key, what in finite.items():
            if not math.isfinite(numbers[key]):
                names = ", ".join(data.names(seed=job.seed, step=step - 1, parts=parts, batch_size=job.batch_size))
                raise RunError(
                    f"the {what} of step {step} is {numbers[key]}, at {names}: lower lr, or look at these pictures; "
                    f"the last checkpoint is from before it"
                )
        shown.set_postfix(loss=f"{numbers['loss']:.4f}", lr=f"{numbers['lr']:.1e}", refresh=False)
        shown.update()
        report(step, numbers)

    readings = Readings(job.batch_size * parts, job.learnt.master.device, seen)
    with _stop_on_signal() as stopped, bar(total=job.steps, initial=start, desc="train", unit="step") as shown:
        for step in range(start, job.steps):
            readings.begin()
            if not job.unet.training:  # a measurement left it in evaluation mode; to ask all modules takes 10 ms
                job.unet.train()
            torch.manual_seed(seed_of(job.seed, "dropout", step))  # only an adapter's dropout draws from it
            loss = torch.zeros((), device=job.learnt.master.device)
            for part in range(parts):
                batch = data.batch(
                    seed=job.seed, step=step, part=part, parts=parts, batch_size=job.batch_size,
                    asked=job.asked, caption_dropout=settings.caption_dropout,
                )  # fmt: skip
                loss += job.backward(batch)
            lr = job.rate()
            readings.put(step + 1, loss, job.update(), lr)
            after_step(step + 1, readings.settle)
            if stopped():
                break
        readings.settle()
        return step + 1 if start < job.steps else job.steps


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
