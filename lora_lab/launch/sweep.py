"""Run the jobs of a sweep with Hydra's sweeper and launcher, and report how they ended."""

import sys
from contextlib import nullcontext
from pathlib import Path

from hydra._internal.callbacks import Callbacks  # why: run_job.py
from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from lora_lab.board.page import attach_page, rewrite_page
from lora_lab.console import warn
from lora_lab.errors import InputError
from lora_lab.launch import config
from lora_lab.launch import sweep_folder as sweeps
from lora_lab.launch.command_line import all_points, quote_path, searches, write_points
from lora_lab.launch.config import name_of
from lora_lab.launch.restore import SweepBefore
from lora_lab.launch.run_job import SweepTask, job_settings, sentence
from lora_lab.runs import (
    STOP_FILE,
    SWEEP_RECORD,
    claimed,
    create_folder,
    display_path,
    resume_command,
    stop_jobs_on_signal,
)
from lora_lab.settings import schema

LOCAL_LAUNCHERS = (".BasicLauncher", ".PackedLauncher")  # they run jobs in this process, or handle signals themselves


def run_sweep(composition: DictConfig, runs: list[schema.Config], resumed_folder: Path | None) -> int:
    """Run all jobs into a new folder, or into `resumed_folder`, that of an earlier sweep; returns the exit code.

    `composition` is Hydra's, without what is swept; `runs` are some of the points. Raises InputError for a folder that
    cannot be used."""
    overrides = OmegaConf.to_container(composition.hydra.overrides.hydra, resolve=False)
    user_named = any(name_of(override) == "hydra.sweep.dir" for override in overrides)
    folder = resumed_folder or create_folder(Path(composition.hydra.sweep.dir), user_named, "hydra.sweep.dir")
    with claimed(folder):
        if resumed_folder:
            sweeps.refuse_running(folder)
        elif (folder / SWEEP_RECORD).exists():
            raise InputError(f"{folder} has a sweep already: name another folder, or continue it with resume={folder}")
        # Absolute, because jobs may run in other working directories.
        return _run_jobs(composition, runs, folder.absolute(), user_named or resumed_folder is not None)


def _run_jobs(composition: DictConfig, runs: list[schema.Config], sweep: Path, named: bool) -> int:
    hydra = composition.hydra
    before = SweepBefore(sweep)
    before.keep()
    _set_folder(hydra, sweep)
    record = OmegaConf.to_container(hydra, resolve=False)  # iterating a ListConfig would resolve ${...} in overrides
    task, stop_file = SweepTask(), sweep / STOP_FILE
    local = hydra.launcher["_target_"].endswith(LOCAL_LAUNCHERS)
    try:
        sweeps.write_record(sweep, record["overrides"]["hydra"], record["overrides"]["task"])
        stop_file.unlink(missing_ok=True)
        with nullcontext() if local else stop_jobs_on_signal(stop_file), config.hydra_loader() as loader:
            write_points(sweep, all_points(record, loader))
            _launch(composition, task, loader)
    except KeyboardInterrupt as interrupt:
        print(f"\nlora_lab: {str(interrupt).partition(';')[0] or 'stopped'}; {_how_to_resume(sweep)}", file=sys.stderr)
        before.restore()
        return 1
    except Exception as error:  # of the sweeper or the launcher, for those of jobs are caught in the jobs
        exit_code = _report_abort(sweep, hydra, error)
        before.restore()
        return exit_code
    finally:
        stop_file.unlink(missing_ok=True)
        sweeps.remove_if_unused(sweep, named)
    exit_codes = [*_report_failures(sweep), *task.exit_codes]
    before.restore([failure.folder for failure in sweeps.failures(sweep) if failure.exit_code == 2])
    _show_page(sweep, runs)
    return worst(exit_codes)


def worst(exit_codes: list[int]) -> int:
    """The exit code of a command whose jobs have `exit_codes`: 1 is worse than 2, which is worse than 0."""
    return 1 if 1 in exit_codes else max(exit_codes, default=0)


def _set_folder(hydra: DictConfig, sweep: Path) -> None:
    """Make `sweep` the folder of the sweep, also for the jobs, which are composed from the recorded overrides."""
    overrides = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    others = [override for override in overrides if name_of(override) != "hydra.sweep.dir"]
    hydra.overrides.hydra = [*others, f"hydra.sweep.dir={quote_path(sweep)}"]
    hydra.sweep.dir = str(sweep)


def _launch(composition: DictConfig, task: SweepTask, loader: ConfigLoader) -> None:
    """Do what hydra.main does for a sweep, without composing it again."""
    configure_log(composition.hydra.hydra_logging, composition.hydra.verbose)
    callbacks = Callbacks(composition)
    callbacks.on_multirun_start(config=composition, config_name="config")
    context = HydraContext(config_loader=loader, callbacks=callbacks)
    sweeper = Plugins.instance().instantiate_sweeper(config=composition, hydra_context=context, task_function=task.run)
    sweeper.sweep(arguments=OmegaConf.to_container(composition.hydra.overrides.task, resolve=False))
    callbacks.on_multirun_end(config=composition, config_name="config")


def _report_abort(sweep: Path, hydra: DictConfig, error: Exception) -> int:
    started, exit_codes = sweeps.has_jobs(sweep), _report_failures(sweep)
    no_scores = started and searches(hydra) and not sweeps.has_scores(sweep)
    reason = "no job has a score" if no_scores else sentence(error)
    hint = f"; {_how_to_resume(sweep)}" if started else ""
    warn(f"the sweep was aborted: {reason}{hint}")
    return worst([*exit_codes, 1])


def _report_failures(sweep: Path) -> list[int]:
    """Print why jobs failed in other processes; returns the exit codes of all failed jobs."""
    failed = sweeps.failures(sweep)
    for failure in failed:
        if not failure.reported_here:
            warn(f"{display_path(failure.folder)}: {failure.error}")
    return [failure.exit_code for failure in failed]


def _show_page(sweep: Path, runs: list[schema.Config]) -> None:
    if page := rewrite_page(sweep):
        print(f"\ncompare the runs: {display_path(page)}", flush=True)
        trained = [run for run in runs if isinstance(run.stage, (schema.Train, schema.Pipeline))]  # no photos
        if wandb_runs := [run for run in trained if run.tracker.kind == "wandb"]:
            attach_page(sweep, job_settings(wandb_runs[0], sweep).tracker)


def _how_to_resume(sweep: Path) -> str:
    return f"resume with: {resume_command(sweep)}"
