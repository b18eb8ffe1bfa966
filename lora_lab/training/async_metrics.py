"""Numbers of training steps on their way from the device: read when they are there, so that no step waits for them."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

BEHIND = 2  # steps that a GPU may have been given and not finished


@dataclass(frozen=True)
class _Pending:
    step: int
    lr: float
    names: tuple[str, ...]  # of the values
    values: Tensor  # losses and the norm of the gradient, on the CPU once `done`
    done: torch.cuda.Event | float  # on a CPU the second that it is


class AsyncMetrics:
    """Calls `report(step, numbers)` for every step, in order and a little late on a GPU; `settle` waits for all.

    A step's time is that between two steps' ends on the device, whenever they are read."""

    def __init__(self, images: int, device: torch.device, report: Callable[[int, dict[str, float]], None]) -> None:
        self._images, self._on_gpu, self._report = images, device.type == "cuda", report
        self._pending: deque[_Pending] = deque()
        self._since = self._now()

    def begin(self) -> None:
        """A step begins; what has happened since the last one (drawing, saving) does not count as its time."""
        if not self._pending:
            self._since = self._now()

    def put(self, step: int, loss: Tensor, norm: Tensor, lr: float, **others: Tensor) -> None:
        """`step` steps are done, by now or soon; `others` are losses beside the `loss`, by name."""
        named = {"loss": loss, **others, "grad_norm": norm}
        values = torch.stack(list(named.values()))
        if self._on_gpu:
            values = torch.empty(len(named), pin_memory=True).copy_(values, non_blocking=True)
        self._pending.append(_Pending(step, lr, tuple(named), values, self._now()))
        while len(self._pending) > (BEHIND if self._on_gpu else 0):
            self._read()

    def settle(self) -> None:
        """Report every step that was put."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        pending = self._pending.popleft()
        if self._on_gpu:
            pending.done.synchronize()
            seconds = self._since.elapsed_time(pending.done) / 1000
        else:
            seconds = pending.done - self._since
        self._since = pending.done
        numbers = dict(zip(pending.names, pending.values.tolist(), strict=True))
        numbers |= {"lr": pending.lr, "grad_norm": numbers.pop("grad_norm")}  # in the order that is read: losses, lr
        numbers |= {"images_per_second": self._images / seconds, "memory_mib": memory_mib()}
        self._report(pending.step, numbers)

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def memory_mib() -> float:
    """Peak memory of the GPU's allocator so far, else what the process holds now, in MiB."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20
