"""Run one job: the run of a command line, or a job of a sweep, here or in another process or on another machine.

Imports nothing heavy. A process learns only from files how the jobs of other processes ended."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A user's `hydra.callbacks` are called by this class alone, and hydra.main, which would do it, composes once more.
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, run_job
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.board.page import rewrite_page
from lora_lab.console import labelled_output, log, quiet_libraries, say, warn
from lora_lab.errors import InputError, RunError
from lora_lab.launch import config, workers
from lora_lab.launch import sweep_folder as sweeps
from lora_lab.launch.command_line import searches, write_missing_points
from lora_lab.launch.explain import explain
from lora_lab.launch.restore import FolderBefore, undo_killed
from lora_lab.runs import (
    STOP_FILE,
    claimed,
    create_folder,
    display_path,
    fitting,
    read_result,
    refuse_claimed,
    refuse_missing,
    refuse_unwritable,
    resume_command,
    score_of,
    stage_function,
    stop_file_of,
    sweep_of,
    write_result,
)
from lora_lab.settings import schema
from lora_lab.settings.schema import Config
from lora_lab.shared import Shared

INPUT_ERRORS = (InputError, HydraException, OmegaConfBaseException)
JOB_SECONDS = 60.0  # a job that a cluster queues again may still be ending in its folder


def prepare_process() -> None:
    """Set what must be set before torch is imported, and before anything is printed."""
    # Segments of GPU memory that can grow: memory that was freed in blocks of one size can be used for another size.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Threads that wait for each other spin a short time, then sleep. With OpenMP's own 300,000 turns they spin against
    # each other beside another busy process, and the demo trains at 0.3 to 2 steps a second instead of 3.4; threads
    # that sleep at once (PASSIVE) hold 4.7 there, but an idle machine with 2 cores trains at 4.9 instead of 8.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Korean file name must not end a run on an ASCII terminal
            stream.reconfigure(errors="backslashreplace")


def run_once(composition: DictConfig, settings: schema.Config) -> int:
    """Run the one job of a command line; returns the exit code. Raises OSError if its folder cannot be created.

    `composition` is Hydra's, with its own part; `settings` are what was typed of it."""
    exit_codes: list[int] = []

    def task(_: DictConfig) -> float | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if stop_file := stop_file_of(folder):  # a job of a sweep, run alone
            stop_file.unlink(missing_ok=True)
            write_missing_points(stop_file.parent)
        try:
            run_stage(settings, folder)
            (folder / "failed.json").unlink(missing_ok=True)
            return score_of(read_result(folder))
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(_with_resume(str(interrupt) or "stopped", folder)) from None
        except Exception as error:  # raised, Hydra would print it in its own words
            exit_codes.append(report(error))
            return None

    composition.hydra.mode = RunMode.RUN
    configure_log(composition.hydra.hydra_logging, composition.hydra.verbose)
    before = _create_folder(composition)
    try:
        with config.hydra_loader() as loader, claimed(before.folder):
            before.keep()
            callbacks = Callbacks(composition)
            callbacks.on_run_start(config=composition, config_name="config")
            job_return = run_job(task, composition, "hydra.run.dir", None, HydraContext(loader, callbacks))
            callbacks.on_run_end(config=composition, config_name="config", job_return=job_return)
    finally:  # also after Ctrl-C: the page shows how far the job came
        if exit_codes == [2]:
            before.restore()
        else:
            before.restore_words()
            if sweep := sweep_of(before.folder):
                rewrite_page(sweep)
    return max(exit_codes, default=0)


def _with_resume(reason: str, folder: Path) -> str:
    """`reason` for which a run stopped, and the command that continues it."""
    return reason if "resume=" in reason else f"{reason}; resume with: {resume_command(folder)}"


def _create_folder(composition: DictConfig) -> FolderBefore:
    """Create the folder of a run, make it Hydra's, and return what it was. A name with the time in it is not the
    user's."""
    named = "${now:" not in OmegaConf.to_container(composition.hydra.run, resolve=False)["dir"]
    HydraConfig.instance().set_config(deepcopy(composition))  # for a name with ${hydra:...}; it makes it read-only
    wanted = Path(composition.hydra.run.dir)
    undo_killed(wanted)
    missing = [path for path in (wanted, *wanted.parents) if not path.exists()]
    folder = create_folder(wanted, named, "hydra.run.dir")
    refuse_claimed(folder)  # before its files are read, which another process would replace meanwhile
    composition.hydra.run.dir = str(folder)
    return FolderBefore(folder, missing if folder == wanted else [folder])


@dataclass
class SweepTask:
    """What Hydra's launchers call for each job of a sweep.

    Hydra passes a task nothing but the configuration. So this object holds what the process of the command must know
    about jobs and cannot read from a file."""

    exit_codes: list[int] = field(default_factory=list)  # of jobs that could not leave a failed.json
    in_worker: bool = False
    shared: Shared = field(default_factory=Shared)  # by the jobs of this process

    def __reduce__(self) -> tuple[Any, ...]:
        # Launchers pickle the task to send it to other processes, and to nobody else: there it is a worker's.
        return SweepTask, ([], True)

    def run(self, cfg: DictConfig) -> float | None:
        """Run the job; returns its score, or None if it has none or failed.

        An error is reported and written down here, because Hydra would print it in its own words, and only that of the
        first job. Optuna takes a trial that returned None as failed and continues; a NaN would end the search. Raises
        KeyboardInterrupt in the process of the command, which ends the sweep."""
        hydra = HydraConfig.get()
        sweep = Path(hydra.sweep.dir)
        if self.in_worker:
            workers.end_with_parent()
            prepare_process()
            os.chdir(hydra.runtime.cwd)  # Ray starts its workers in a folder of their own
        try:
            with labelled_output(f"#{hydra.job.num} ") if self.in_worker else nullcontext():
                if (sweep / STOP_FILE).exists():
                    raise KeyboardInterrupt
                return self._run(cfg, hydra, sweep)
        except KeyboardInterrupt:
            if not self.in_worker:
                raise
            return None  # an exception would make the launcher kill the other jobs, which are saving checkpoints
        finally:  # also after Ctrl-C: the page shows how far the job came
            rewrite_page(sweep)

    def _run(self, cfg: DictConfig, hydra: DictConfig, sweep: Path) -> float | None:
        folder, number, overrides = Path(hydra.runtime.output_dir), hydra.job.num, config.plain(hydra.overrides.task)
        try:
            recorded = sweeps.recorded_overrides(folder, number)
            if result := sweeps.finished_result(folder, number, overrides):
                say(f"{display_path(folder)} is done")
                return score_of(result)
            if recorded and searches(hydra):
                if recorded != sorted(overrides):
                    name = display_path(folder)
                    raise InputError(f"{name} has another trial: the search cannot be repeated, start a new one")
                if (folder / "failed.json").is_file():  # the sampler chose the next points knowing that it failed
                    return None
        except Exception as error:  # the folder belongs to another job, so failed.json would be about that one
            self.exit_codes.append(report(error, f"{' '.join(overrides)}: "))
            return None
        try:
            settings = job_settings(config.typed(cfg), sweep)
            with claimed(folder, JOB_SECONDS):
                if recorded:
                    resume_in(settings, folder)
                sweeps.record_start(folder, number, overrides)
                run_stage(settings, folder, self.shared)
            score = score_of(read_result(folder))
        except Exception as error:
            fail(folder, overrides, error)
            return None
        if self.in_worker:
            say(f"done{'' if score is None else f', score {score:.3f}'}: {display_path(folder)}")
        return score


def job_settings(settings: schema.Config, sweep: Path) -> schema.Config:
    """Change `settings` for a job of `sweep`: one group for the tracker, no copy of the LoRA unless it is set."""
    if settings.tracker.group is None:
        settings.tracker.group = fitting("-".join(sweep.parts[-2:]))  # date and time
    settings.publish = bool(settings.publish)
    return settings


def resume_in(settings: schema.Config, folder: Path) -> None:
    """Change `settings` so that the job continues from what it left in `folder` when it was stopped."""
    if isinstance(settings.stage, schema.Train) and not any(folder.glob("checkpoints/step-*/training.json")):
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # training starts again and writes the same lines
        settings.resume = None
    else:
        settings.resume = str(folder)


def fail(folder: Path, overrides: Sequence[str], error: Exception) -> None:
    """Report the error of the job in `folder`, and write it down there."""
    sweeps.write_failure(folder, sentence(error), report(error, f"{' '.join(overrides)}: "))


def report(error: Exception, prefix: str = "", overrides: Sequence[str] = ()) -> int:
    """Print `error` on stderr, in one sentence or, if it is a fault of the program, with its traceback.

    Returns the exit code: 2 for wrong input, 1 for anything else."""
    if isinstance(error, (RunError, *INPUT_ERRORS)):
        warn(f"{prefix}{sentence(error, overrides)}")
    else:
        traceback.print_exception(error)
        log.info("%s", sentence(error), exc_info=error)
    return 2 if isinstance(error, INPUT_ERRORS) else 1


def sentence(error: Exception, overrides: Sequence[str] = ()) -> str:
    """`error` in one sentence; `overrides` are the command line that it is about."""
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, INPUT_ERRORS):
        return explain(error, overrides)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def run_stage(config: Config, folder: Path, shared: Shared | None = None) -> object:
    """Do what `config.stage` says in `folder`, and leave its result there as result.json.

    `shared` is what earlier jobs of a sweep left in this process."""
    shared = shared or Shared()
    quiet_libraries()
    refuse_missing(folder, config.resume)
    refuse_unwritable(folder)
    if not config.stage.draws:
        shared.free()  # a training needs the memory
    result = stage_function(type(config.stage))(config, folder, *([shared] if config.stage.draws else []))
    write_result(folder, result)
    return result
