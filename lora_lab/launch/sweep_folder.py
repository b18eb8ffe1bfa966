"""The folder of a sweep: created before the first job, and the only way to learn how jobs in other processes ended.

multirun.yaml     the command line
points.json       number, overrides and values of every job
stop              exists while a sweep is being stopped: running jobs end after their step, no other job starts
0/, 1/, ...       a run folder for each job, which also has
    job.json      the job's overrides and process
    failed.json   if it failed, the error in one sentence"""

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_lab.errors import InputError
from lora_lab.runs import STOP_FILE, SWEEP_RECORD, read_result, score_of, write_json

POINTS, LOCK = "points.json", ".lock"


@dataclass(frozen=True)
class Failure:
    """What failed.json says of a job."""

    folder: Path
    error: str
    exit_code: int
    reported_here: bool  # the error is on this process's stderr already


def create_folder(folder: Path, named: bool) -> Path:
    """Create `folder` and return it, or one with a number behind its name if two sweeps start in the same second.

    A folder that the user `named` may exist, unless it has a sweep. Raises InputError."""
    if named and (folder / SWEEP_RECORD).exists():
        raise InputError(f"{folder} has a sweep already: name another folder, or continue it with resume={folder}")
    for number in range(1000):
        numbered = folder.with_name(f"{folder.name}-{number}") if number else folder
        try:
            numbered.mkdir(parents=True, exist_ok=named)
            return numbered
        except FileExistsError:
            if named:
                raise InputError(f"{folder}: not a folder, set hydra.sweep.dir= to another one") from None
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}; set hydra.sweep.dir= to another folder") from error
    raise InputError(f"{folder}: exists, set hydra.sweep.dir= to another folder")


def remove_if_unused(folder: Path, named: bool) -> None:
    """Remove the sweep's own files from `folder`, and what `create_folder` created, if no job started."""
    if {file.name for file in folder.iterdir()} <= {SWEEP_RECORD, POINTS, STOP_FILE}:
        for file in folder.iterdir():
            file.unlink()
        for empty in () if named else (folder, folder.parent, folder.parent.parent):
            with suppress(OSError):
                empty.rmdir()


def write_record(folder: Path, hydra: Sequence[str], task: Sequence[str]) -> None:
    """Write multirun.yaml with what resume= reads of it; Hydra's sweeper replaces it by the whole configuration."""
    write_json(
        folder / SWEEP_RECORD, {"hydra": {"overrides": {"hydra": list(hydra), "task": list(task)}}}
    )  # is YAML too


def recorded_overrides(job: Path, number: int) -> list[str] | None:
    """The overrides, sorted, of the job that was started in the folder `job`; None if there was none.

    Raises InputError if it was a job of another number."""
    file = job / "job.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["number"] != number:
        raise InputError(f"{job} is the folder of job {record['number']}: hydra.sweep.subdir must tell the jobs apart")
    return sorted(record["overrides"])


def finished_result(job: Path, number: int, overrides: Sequence[str]) -> dict[str, Any] | None:
    """The result of the job in the folder `job` if it finished with these overrides.

    Raises InputError if the folder has a job of another number."""
    return read_result(job) if recorded_overrides(job, number) == sorted(overrides) else None


def record_start(job: Path, number: int, overrides: Sequence[str]) -> None:
    """Write job.json; an earlier failure is forgotten, and the result of other overrides becomes result.before.json."""
    if recorded_overrides(job, number) not in (None, sorted(overrides)):
        for name in ("result", "failed"):
            with suppress(FileNotFoundError):
                (job / f"{name}.json").replace(job / f"{name}.before.json")
    (job / "failed.json").unlink(missing_ok=True)
    write_json(job / "job.json", {"number": number, "overrides": list(overrides), **_process()})


def _process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


@contextmanager
def job_lock(job: Path) -> Iterator[None]:
    """Lock the folder `job` against other processes; the system releases the lock when this process dies.

    Raises InputError if it stays locked for a minute."""
    try:
        with FileLock(job / LOCK, timeout=60):  # a job that a cluster queues again may still be ending
            yield
    except Timeout:
        raise InputError(f"{job}: another process works in this folder, wait for it or end it") from None


def refuse_running(sweep: Path) -> None:
    """Raise InputError if a job of `sweep` still runs though its command was killed: both would write into a folder."""
    for lock in sweep.rglob(LOCK):
        try:
            with FileLock(lock, timeout=0):
                pass
        except Timeout:
            record = json.loads((lock.parent / "job.json").read_text(encoding="utf-8"))
            raise InputError(
                f"{lock.parent}: its job still runs, process {record['pid']} on {record['host']}: wait for it or end it"
            ) from None


def write_failure(job: Path, error: str, exit_code: int) -> None:
    """Write failed.json, with the process that reported the error."""
    write_json(job / "failed.json", {"error": error, "exit_code": exit_code, **_process()})


def failures(sweep: Path) -> list[Failure]:
    """The failed jobs of `sweep`, in the order of their folders."""
    records = [(file.parent, json.loads(file.read_text(encoding="utf-8"))) for file in sweep.rglob("failed.json")]
    failed = [
        Failure(job, record["error"], record.get("exit_code", 1), record.items() >= _process().items())
        for job, record in records
    ]
    return sorted(failed, key=lambda failure: (len(failure.folder.name), failure.folder.name))


def has_jobs(sweep: Path) -> bool:
    """Whether any job of the sweep was started."""
    return any(sweep.rglob("job.json"))


def has_scores(sweep: Path) -> bool:
    """Whether any job of the sweep has a score."""
    return any(score_of(read_result(file.parent)) is not None for file in sweep.rglob("result.json"))
