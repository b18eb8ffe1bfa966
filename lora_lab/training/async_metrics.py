"""Metrics of training steps on their way from the device: read once they have arrived, so that no step waits."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

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
