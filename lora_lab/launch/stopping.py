"""Ctrl-C that waits for the end of a step: in the training of this process, or in the jobs of a sweep."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_lab.console import say
from lora_lab.runs import stop_file_of

POLL_SECONDS = 1.0  # between two looks for the stop file, which may lie on a network drive


@contextmanager
def stop_on_signal(folder: Path | None = None) -> Iterator[Callable[[], bool]]:
    """Within the context the first Ctrl-C (or SIGTERM) only sets a flag, so that a checkpoint can be written.

    Gives a function that returns the flag. It is also set once the sweep that the run in `folder` is a job of has its
    stop file. A second Ctrl-C raises KeyboardInterrupt."""
    received: list[int] = []
    polled, stop_file = time.monotonic(), stop_file_of(folder) if folder else None

    def stopped() -> bool:
        nonlocal polled
        if not received and stop_file is not None and time.monotonic() - polled > POLL_SECONDS:
            polled = time.monotonic()
            if stop_file.exists():
                received.append(0)
        return bool(received)

    with _on_signal(received, lambda: say("stopping after this step (Ctrl-C again stops at once)")):
        yield stopped


@contextmanager
def stop_jobs_on_signal(stop_file: Path) -> Iterator[None]:
    """Within the context the first Ctrl-C creates `stop_file`, which jobs in other processes look for.

    Without it a launcher would kill them in the middle of a step. Raises KeyboardInterrupt at the end of a context that
    received a signal, and at once at the second one."""

    def create_stop_file() -> None:
        stop_file.touch()
        print("stopping all jobs after their step (Ctrl-C again stops at once)", flush=True)

    received: list[int] = []
    with _on_signal(received, create_stop_file):
        yield
    if received:
        raise KeyboardInterrupt


@contextmanager
def _on_signal(received: list[int], on_first: Callable[[], None]) -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        on_first()

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may set handlers; in another one signals do not arrive
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
