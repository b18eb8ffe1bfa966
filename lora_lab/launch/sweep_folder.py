"""A sweep's folder: claimed before the first job, and read by whoever wants to know how the jobs ended.

multirun.yaml     the command line
stop              there while Ctrl-C ends it: jobs stop after their step, and none begins
0/, 1/, ...       a run folder a job, which has besides
    job.json      its overrides, so that going on knows whether what is there is its own
    failed.json   the sentence, if it failed"""

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from lora_lab.errors import InputError
from lora_lab.runs import write_json

RECORD, STOP, LOCK = "multirun.yaml", "stop", ".lock"


@dataclass(frozen=True)
class Failure:
    folder: Path
    error: str
    exit_code: int


def claim(folder: Path, named: bool) -> Path:
    """Make `folder`; a free one beside it where two sweeps begin in one second. One that the user `named` is used as it
    is, unless it has a sweep. Raises InputError."""
    if named and (folder / RECORD).exists():
        raise InputError(f"{folder} has a sweep already: name another folder, or go on with resume={folder}")
    for number in range(1000):
        free = folder.with_name(f"{folder.name}-{number}") if number else folder
        try:
            free.mkdir(parents=True, exist_ok=named)
            return free
        except FileExistsError:
            if named:
                raise InputError(f"{folder}: is no folder, name another with hydra.sweep.dir=") from None
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}; choose another with hydra.sweep.dir=") from error
    raise InputError(f"{folder}: taken, name another folder with hydra.sweep.dir=")


def release(folder: Path, named: bool) -> None:
    """Take away what `claim` made, if no job began there."""
    if {file.name for file in folder.iterdir()} <= {RECORD, STOP}:
        for file in folder.iterdir():
            file.unlink()
        for empty in () if named else (folder, folder.parent, folder.parent.parent):
            with suppress(OSError):
                empty.rmdir()


def write_record(folder: Path, hydra: Sequence[str], task: Sequence[str]) -> None:
    """multirun.yaml as far as resume= reads it; Hydra's own sweeper writes the whole configuration over it."""
    write_json(folder / RECORD, {"hydra": {"overrides": {"hydra": list(hydra), "task": list(task)}}})  # JSON is YAML


def begun(job: Path, number: int) -> list[str] | None:
    """The overrides, sorted, of what was begun in `job`; None if nothing was. Raises InputError if another's was."""
    record = job / "job.json"
    if not record.is_file():
        return None
    known = json.loads(record.read_text(encoding="utf-8"))
    if known["number"] != number:
        raise InputError(f"{job} is the folder of job {known['number']}: hydra.sweep.subdir must tell the jobs apart")
    return sorted(known["overrides"])


def begin(job: Path, number: int, overrides: Sequence[str]) -> None:
    """Say whose folder `job` is. A result that it had with other overrides is none any more, but kept; and what it
    failed with before is tried again."""
    if begun(job, number) not in (None, sorted(overrides)):
        for name in ("result", "failed"):
            with suppress(FileNotFoundError):
                (job / f"{name}.json").replace(job / f"{name}.before.json")
    (job / "failed.json").unlink(missing_ok=True)
    known = {"number": number, "overrides": list(overrides), "host": socket.gethostname(), "pid": os.getpid()}
    write_json(job / "job.json", known)


@contextmanager
def held(job: Path) -> Iterator[None]:
    """Within the context no other process may work in `job`. The system lets go of it when this one is killed."""
    try:
        with FileLock(job / LOCK, timeout=60):  # a job that is queued again may still be ending
            yield
    except Timeout:
        raise InputError(f"{job}: another process works there, wait for it or end it") from None


def refuse_running(sweep: Path) -> None:
    """Raise InputError if a job of `sweep` runs on though the sweep was killed: two would write into one folder."""
    for lock in sweep.rglob(LOCK):
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            job = json.loads((lock.parent / "job.json").read_text(encoding="utf-8"))
            raise InputError(
                f"{lock.parent}: its job still runs, process {job['pid']} on {job['host']}: wait for it or end it"
            ) from None


def write_failure(job: Path, error: str, exit_code: int) -> None:
    write_json(job / "failed.json", {"error": error, "exit_code": exit_code})


def failures(sweep: Path) -> list[Failure]:
    """The jobs of `sweep` that failed, in their order."""
    found = [(file.parent, json.loads(file.read_text(encoding="utf-8"))) for file in sweep.rglob("failed.json")]
    jobs = [Failure(folder, said["error"], said.get("exit_code", 1)) for folder, said in found]
    return sorted(jobs, key=lambda job: (len(job.folder.name), job.folder.name))


def result_of(job: Path) -> dict | None:
    file = job / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def score_of(result: dict) -> float | None:
    """The one number of a run, the higher the better; None where nothing was measured."""
    return result["scores"]["score"]["value"] if result.get("scores") else None


def has_jobs(sweep: Path) -> bool:
    return any(sweep.rglob("job.json"))


def scored(sweep: Path) -> bool:
    return any(score_of(result_of(file.parent)) is not None for file in sweep.rglob("result.json"))
