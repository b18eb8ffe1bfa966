"""Ctrl-C that waits for the end of a step: of the training here, or of the jobs of a sweep wherever they run."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_lab.console import say

LOOK_SECONDS = 1.0  # between two looks for the file, which may lie on a network drive

_file: Path | None = None


def stop_with(file: Path | None) -> None:
    """From now on the training of this process also stops after its step when `file` is there."""
    global _file
    _file = file


def asked() -> bool:
    return _file is not None and _file.exists()


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or SIGTERM) waits for the end of the step, so that a checkpoint can be written."""
    seen: list[int] = []
    looked = time.monotonic()

    def stopped() -> bool:
        nonlocal looked
        if not seen and _file is not None and time.monotonic() - looked > LOOK_SECONDS:
            looked = time.monotonic()
            if asked():
                seen.append(0)
        return bool(seen)

    with _on_signal(seen, lambda: say("stopping after this step (Ctrl-C again stops at once)")):
        yield stopped


@contextmanager
def stopping_jobs(file: Path) -> Iterator[None]:
    """Within the context the first Ctrl-C makes `file`, for jobs in other processes, and waits for them.

    Without that a launcher would kill them in the middle of a step. Raises KeyboardInterrupt when they are done."""

    def ask() -> None:
        file.touch()
        print("stopping all jobs after their step (Ctrl-C again stops at once)", flush=True)

    seen: list[int] = []
    with _on_signal(seen, ask):
        yield
    if seen:
        raise KeyboardInterrupt


@contextmanager
def _on_signal(seen: list[int], first: Callable[[], None]) -> Iterator[None]:
    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        first()

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
