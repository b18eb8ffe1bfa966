"""Work in fresh processes, one at a time on each GPU, which is all it sees: what it takes of that ends with it.

Imports nothing heavy: a process has its GPU before it imports torch."""

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from hydra.core.utils import env_override

from lora_lab.launch.stopping import stopping_jobs

T = TypeVar("T")
LOOK_SECONDS = 1.0  # between two looks at processes whose end is not told, for children of theirs that still run
GRACE = 5.0  # seconds to close a tracker in, where a second Ctrl-C stops at once

Task = Callable[[], None]  # a partial of a module's function, which goes to another process


def places(wanted: int | None, devices: set[str]) -> list[str | None]:
    """A place for each of the `wanted` workers, None means one for each GPU: the GPU as CUDA_VISIBLE_DEVICES names it.

    The place is None on a CPU, and where `devices` of the configuration name a GPU."""
    gpus = visible_gpus() if devices <= {"auto", "cuda"} else []
    here = gpus or [None]
    return [here[i % len(here)] for i in range(wanted or len(here))]


def visible_gpus() -> list[str]:
    """By number or, where this process was given some, by the names that it was given. Takes nothing of them."""
    import torch

    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in given.split(",")][:count] if given else [str(i) for i in range(count)]


def elsewhere(function: Callable[..., T], *arguments: object) -> T:
    """What `function` says in a process that ends: one that has looked at a GPU keeps some of its memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def spread(
    tasks: Sequence[Task],
    places: Sequence[str | None],
    begins: Callable[[int, str | None], None],
    ended: Callable[[int, int], None],
    stop: Path,
) -> None:
    """Do `tasks`, in their order, each in a process of its own at the next place that is free.

    `begins(number, place)` and `ended(number, exit code)` are called here. Once there is a file `stop` none begins. The
    first Ctrl-C makes it, waits for those that run, and raises KeyboardInterrupt; a second one stops at once."""
    waiting, free = list(range(len(tasks))), list(places)
    running: dict[BaseProcess, tuple[int, str | None]] = {}
    with stopping_jobs(stop):
        try:
            while True:
                while waiting and free and not stop.exists():
                    number, place = waiting.pop(0), free.pop(0)
                    begins(number, place)
                    process = get_context("spawn").Process(target=_work, args=(tasks[number],))
                    with _seeing(place):
                        process.start()
                    running[process] = number, place
                if not running:
                    return
                wait([process.sentinel for process in running], LOOK_SECONDS)
                for process in [process for process in running if process.exitcode is not None]:
                    number, place = running.pop(process)
                    free.append(place)
                    ended(number, process.exitcode)
        finally:
            _end(list(running))


def _seeing(place: str | None) -> AbstractContextManager[None]:
    """What begins within the context sees that GPU alone: set before it begins, for torch looks once."""
    return nullcontext() if place is None else env_override({"CUDA_VISIBLE_DEVICES": place})


def _work(task: Task) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):  # how far it came stands in its files
        task()


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE)
        process.kill()
        process.join()
