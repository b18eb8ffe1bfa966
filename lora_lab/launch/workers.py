"""Run tasks in new processes, one at a time on each GPU; all memory of a task is freed when its process ends.

Imports nothing heavy: a process must be given its GPU before it imports torch."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

from hydra.core.utils import env_override

from lora_lab.runs import stop_jobs_on_signal

T = TypeVar("T")
POLL_SECONDS = 1.0  # between two checks of processes whose end is not signalled, because their children still run
GRACE_SECONDS = 5.0  # to close a tracker after the second Ctrl-C, or to end a step without the command
WATCH = "end_with_parent"  # name of a thread

Task = Callable[[], None]  # a partial of a module's function, which can be pickled


def places(count: int | None, devices: set[str]) -> list[str | None]:
    """The place of each of `count` workers (None: one for each GPU): a GPU as CUDA_VISIBLE_DEVICES names it.

    It is None on a CPU, and if one of the configured `devices` names a GPU."""
    gpus = visible_gpus() if devices <= {"auto", "cuda"} else []
    available = gpus or [None]
    return [available[i % len(available)] for i in range(count or len(available))]


def visible_gpus() -> list[str]:
    """The GPUs of this process: their names in CUDA_VISIBLE_DEVICES, or their numbers if it is not set.

    Allocates no GPU memory."""
    import torch

    count, names = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in names.split(",")][:count] if names else [str(i) for i in range(count)]


def run_in_process(function: Callable[..., T], *arguments: object) -> T:
    """What `function` returns in a new process: a process that asks a GPU for its free memory keeps some of it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def end_with_parent() -> None:
    """Let this process end when the one that started it dies, however that happens: with a checkpoint, if it trains."""
    if any(thread.name == WATCH for thread in threading.enumerate()):
        return  # joblib's workers do one job after the other
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)  # for the end of a step
        os._exit(1)

    threading.Thread(target=watch, name=WATCH, daemon=True).start()


def run_tasks(
    tasks: Sequence[Task],
    places: Sequence[str | None],
    on_start: Callable[[int, str | None], None],
    on_end: Callable[[int, int], None],
    stop_file: Path,
) -> None:
    """Run `tasks`, in their order, each in a new process at the next free place.

    `on_start(number, place)` and `on_end(number, exit code)` are called in this process. Once `stop_file` exists, no
    task is started. The first Ctrl-C creates it, waits for the running tasks, and raises KeyboardInterrupt; the second
    one ends them at once."""
    waiting, free = list(range(len(tasks))), list(places)
    running: dict[BaseProcess, tuple[int, str | None]] = {}
    with stop_jobs_on_signal(stop_file):
        try:
            while True:
                while waiting and free and not stop_file.exists():
                    number, place = waiting.pop(0), free.pop(0)
                    on_start(number, place)
                    process = get_context("spawn").Process(target=_run_task, args=(tasks[number],))
                    with _visible(place):
                        process.start()
                    running[process] = number, place
                if not running:
                    return
                wait([process.sentinel for process in running], POLL_SECONDS)
                for process in [process for process in running if process.exitcode is not None]:
                    number, place = running.pop(process)
                    free.append(place)
                    on_end(number, process.exitcode)
        finally:
            _end(list(running))


def _visible(place: str | None) -> AbstractContextManager[None]:
    """Within the context new processes see only the GPU `place`. Set before they start, because torch reads it once."""
    return nullcontext() if place is None else env_override({"CUDA_VISIBLE_DEVICES": place})


def _run_task(task: Task) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end_with_parent()
    with suppress(KeyboardInterrupt):  # the files of the jobs show how far they came
        task()


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE_SECONDS)
        process.kill()
        process.join()
