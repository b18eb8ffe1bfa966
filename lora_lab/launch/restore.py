"""The record of a run or a sweep changes only for a command that does something: else it is put back.

Hydra writes the words of a command before its stage checks the inputs. What was there is therefore kept: in memory for
a command that is refused, and in a file for one that is killed, whose words the next command undoes."""

import logging
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_lab.board.record import read_object
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.images.scan import leads_out
from lora_lab.launch.sweep_folder import POINTS, refuse_running
from lora_lab.runs import (
    BEFORE,
    HOLDER,
    LOCK,
    SWEEP_RECORD,
    TEMPORARY,
    claimed,
    display_path,
    sweep_of,
    write_atomically,
    write_json,
)

RECORD = ".hydra"  # Hydra's folder in that of a run
HYDRAS = ("config", "hydra", "overrides")  # the files in it
WORDS = ("job.json", "result.json", "result.before.json")  # beside it: what a sweep's job was asked for, and gave


class FolderBefore:
    """A run folder before a command: what Hydra and the log write into it, and the state of all else."""

    def __init__(self, folder: Path, missing: Sequence[Path] = ()) -> None:
        """`missing` are those of `folder` and the folders that it is in which were created for it, innermost first."""
        self.folder, self.missing = folder, missing
        self.records = {file: file.read_bytes() for file in self._files() if _is_record(file)}
        self.others, self.result = self._others(), self._result()

    def keep(self) -> None:
        """Write down the words of the run for `undo_killed`; a new run has none."""
        if self._has_words():
            write_json(self.folder / BEFORE, self.to_json())

    def restore(self) -> None:
        """Put back what a refused run has overwritten, and remove what it has added; a run that did more stays as it
        is."""
        if self._is_idle():
            for handler in logging.root.handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.close()
            _put_back(self.records, [file for file in self._files() if _is_record(file)])
            if self.missing and not self._files():
                shutil.rmtree(self.folder, ignore_errors=True)
            for folder in (self.folder / RECORD, *self.missing):
                with suppress(OSError):
                    folder.rmdir()  # which is possible only if it is empty
        (self.folder / BEFORE).unlink(missing_ok=True)

    def restore_words(self) -> None:
        """Put back the words of a run that ended in another way before it did anything; the log and the error stay."""
        if self._has_words() and self._is_idle():
            words = {file: content for file, content in self.records.items() if _has_words(file)}
            _put_back(words, [file for file in self._files() if _has_words(file)])
        (self.folder / BEFORE).unlink(missing_ok=True)

    def is_unchanged(self) -> bool:
        """Whether the folder is as it was; its log may have lines more."""
        job = self.folder / "job.json"
        return self._others() == self.others and job.is_file() and job.read_bytes() == self.records.get(job)

    def to_json(self) -> dict[str, Any]:
        """The words, and the state of all else, for `from_json`."""
        words = {file: content.decode("latin-1") for file, content in self.records.items() if _has_words(file)}
        return {"words": _named(words, self.folder), "others": _named(self.others, self.folder), "result": self.result}

    @classmethod
    def from_json(cls, folder: Path, kept: dict[str, Any]) -> "FolderBefore":
        """The run in `folder` as it was before the command that has written `kept`."""
        before = cls(folder)
        before.records = _own(folder, kept["words"], (*(f"{RECORD}/{name}.yaml" for name in HYDRAS), *WORDS))
        before.others = {folder / name: tuple(state) for name, state in kept["others"].items()}
        before.result = kept["result"] and tuple(kept["result"])
        return before

    def _has_words(self) -> bool:
        return any(file.parent.name == RECORD for file in self.records)

    def _is_idle(self) -> bool:
        """Whether the run has left nothing but its words, its log and its error."""
        return self._others() == self.others and self._result() in (None, self.result)

    def _files(self) -> list[Path]:
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        return [file for file in files if file.name != BEFORE and not TEMPORARY.fullmatch(file.name)]

    def _others(self) -> dict[Path, tuple[int, int]]:
        return {file: _state(file) for file in self._files() if not _is_record(file)}

    def _result(self) -> tuple[int, int] | None:
        file = self.folder / "result.json"  # a job with other words moves it away before it checks its inputs
        return _state(file) if file.is_file() else None


class SweepBefore:
    """The folder of a sweep before a command: its command line, and its jobs."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.records = {file: file.read_bytes() for name in (SWEEP_RECORD, POINTS) if (file := sweep / name).is_file()}
        self.jobs = {file.parent: FolderBefore(file.parent) for file in sweep.rglob("job.json")}

    def keep(self) -> None:
        """Write down the words of the sweep and its jobs for `undo_killed`; a new sweep has none."""
        if self.records:
            words = {file: content.decode("latin-1") for file, content in self.records.items()}
            jobs = {job: before.to_json() for job, before in self.jobs.items()}
            write_json(self.sweep / BEFORE, {"words": _named(words, self.sweep), "jobs": _named(jobs, self.sweep)})

    def restore(self, refused: Collection[Path] = ()) -> None:
        """Put back what `refused` jobs were, and the words of others that did nothing; those of the sweep too if no job
        did anything with the new ones."""
        for folder, before in self.jobs.items():
            if folder in refused:
                before.restore()
            else:
                before.restore_words()
        jobs = {file.parent for file in self.sweep.rglob("job.json")}
        if jobs == self.jobs.keys() and all(job.is_unchanged() for job in self.jobs.values()):
            _put_back(self.records, [])
        (self.sweep / BEFORE).unlink(missing_ok=True)

    @classmethod
    def from_json(cls, sweep: Path, kept: dict[str, Any]) -> "SweepBefore":
        """The sweep as it was before the command that has written `kept`."""
        before = cls(sweep)
        before.records = _own(sweep, kept["words"], (SWEEP_RECORD, POINTS))
        jobs = _named({job: job for job in before.jobs}, sweep)
        before.jobs = {job: FolderBefore.from_json(job, kept["jobs"][name]) for name, job in jobs.items()}
        return before


def undo_killed(folder: Path) -> None:
    """Put back the words of the run or the sweep in `folder`, where a command that did nothing was killed.

    Does nothing while a command still works there."""
    of_sweep = sweep_of(folder / "job")  # the folder itself, if it is a sweep's
    for file in [*of_sweep.rglob(BEFORE)] if of_sweep else [*folder.glob(BEFORE)]:
        with suppress(InputError), claimed(file.parent):
            refuse_running(file.parent)
            kept = read_object(file.parent, BEFORE)
            try:
                if "jobs" in kept:
                    SweepBefore.from_json(file.parent, kept).restore()
                else:
                    FolderBefore.from_json(file.parent, kept).restore_words()
            except (KeyError, TypeError, ValueError, AttributeError):
                say(f"{display_path(file)} is damaged, and was not used")


def _put_back(records: dict[Path, bytes], present: Sequence[Path]) -> None:
    """Write `records`, the result last, by whose age `_is_idle` knows a run that did something; and remove the other
    files that are `present`."""
    for file in present:
        if file not in records:
            file.unlink()
    for file, content in sorted(records.items(), key=lambda item: item[0].name == "result.json"):
        if not file.is_file() or file.read_bytes() != content:
            write_atomically(file, lambda temporary, content=content: temporary.write_bytes(content))


def _own(folder: Path, words: dict[str, str], names: Sequence[str]) -> dict[Path, bytes]:
    """The files of `names` in `folder` that `words` has; none elsewhere, whoever wrote that."""
    files = {folder / name: words[name].encode("latin-1") for name in names if name in words}
    return {file: content for file, content in files.items() if not leads_out(file, folder)}


def _state(file: Path) -> tuple[int, int]:
    state = file.stat()
    return state.st_mtime_ns, state.st_size


def _named(values: dict[Path, Any], folder: Path) -> dict[str, Any]:
    return {file.relative_to(folder).as_posix(): value for file, value in values.items()}


def _has_words(file: Path) -> bool:
    return file.parent.name == RECORD or file.name in WORDS


def _is_record(file: Path) -> bool:
    return _has_words(file) or file.suffix == ".log" or file.name in ("failed.json", LOCK, HOLDER)
