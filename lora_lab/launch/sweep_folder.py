"""The folder of a sweep: created before the first job, and the only way to learn how jobs in other processes ended.

multirun.yaml     the command line
points.json       number, overrides and values of every job
stop              exists while a sweep is being stopped: running jobs end after their step, no other job starts
0/, 1/, ...       a run folder for each job, which also has
    job.json      the job's overrides and process
    failed.json   if it failed, the error in one sentence"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.errors import InputError
from lora_lab.runs import (
    BEFORE,
    HOLDER,
    LOCK,
    STOP_FILE,
    SWEEP_RECORD,
    read_result,
    refuse_claimed,
    score_of,
    this_process,
    write_json,
)

POINTS = "points.json"


@dataclass(frozen=True)
class Failure:
    """What failed.json says of a job."""

    folder: Path
    error: str
    exit_code: int
    reported_here: bool  # the error is on this process's stderr already


def remove_if_unused(folder: Path, named: bool) -> None:
    """Remove the sweep's own files from `folder`, and what `create_folder` created, if no job started."""
    if {file.name for file in folder.iterdir()} <= {SWEEP_RECORD, POINTS, STOP_FILE, LOCK, HOLDER, BEFORE}:
        for file in folder.iterdir():
            file.unlink()  # the lock too, of which only this process knows
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
    write_json(job / "job.json", {"number": number, "overrides": list(overrides), **this_process()})


def refuse_running(sweep: Path) -> None:
    """Raise InputError if a job of `sweep` still runs though its command was killed: both would write into a folder."""
    for lock in sweep.rglob(LOCK):
        if lock.parent != sweep:  # which this process has
            refuse_claimed(lock.parent)


def write_failure(job: Path, error: str, exit_code: int) -> None:
    """Write failed.json, with the process that reported the error."""
    write_json(job / "failed.json", {"error": error, "exit_code": exit_code, **this_process()})


def failures(sweep: Path) -> list[Failure]:
    """The failed jobs of `sweep`, in the order of their folders."""
    records = [(file.parent, json.loads(file.read_text(encoding="utf-8"))) for file in sweep.rglob("failed.json")]
    failed = [
        Failure(job, record["error"], record.get("exit_code", 1), record.items() >= this_process().items())
        for job, record in records
    ]
    return sorted(failed, key=lambda failure: (len(failure.folder.name), failure.folder.name))


def has_jobs(sweep: Path) -> bool:
    """Whether any job of the sweep was started."""
    return any(sweep.rglob("job.json"))


def has_scores(sweep: Path) -> bool:
    """Whether any job of the sweep has a score."""
    return any(score_of(read_result(file.parent)) is not None for file in sweep.rglob("result.json"))
