"""hydra/launcher=packed: jobs that differ only in how a LoRA is trained share one base model and each training step.

Every job writes what it writes when it is trained alone. With several GPUs each trains a group of jobs at a time.
Hydra's plugin is hydra_plugins/lora_lab; it imports this module when it launches a sweep."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from lora_lab.board.page import rewrite_page
from lora_lab.console import labelled_output, quiet_libraries, say
from lora_lab.errors import InputError, RunError
from lora_lab.launch import config, workers
from lora_lab.launch import sweep_folder as sweeps
from lora_lab.launch.run_job import JOB_SECONDS, fail, job_settings, prepare_process, resume_in
from lora_lab.runs import STOP_FILE, claimed, display_path, read_result, refuse_unwritable, score_of, write_result
from lora_lab.settings import schema

if TYPE_CHECKING:
    from lora_lab.launch.grouping import Group
    from lora_lab.training.resolve import ResolvedTraining
    from lora_lab.training.run import TrainResult


@dataclass(frozen=True)
class Point:
    """A job of the sweep that is not done yet."""

    number: int
    folder: Path
    overrides: list[str]
    config: schema.Config

    def is_done(self) -> bool:
        return sweeps.finished_result(self.folder, self.number, self.overrides) is not None

    def has_failed(self) -> bool:
        return (self.folder / "failed.json").is_file()


@dataclass(frozen=True)
class SweepContext:
    """What Hydra passes to a launcher, and a job needs in any process."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir)

    def run(self, number: int, overrides: Sequence[str], task: TaskFunction) -> JobReturn:
        """Call `task` as one of Hydra's jobs, with a folder, a record and a log."""
        composition = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composition):
            composition.hydra.job.id = composition.hydra.job.num = number
        try:
            return run_job(task, composition, "hydra.sweep.dir", "hydra.sweep.subdir", self.context)
        finally:
            self.configure_log()

    def configure_log(self) -> None:
        """Log as Hydra does between jobs."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)


def launch(
    sweep: SweepContext, jobs: Sequence[tuple[int, Sequence[str]]], max_jobs: int | None, worker_count: int | None
) -> list[JobReturn]:
    """Run `jobs`, each a number and its overrides, and return what Hydra's sweeper expects of a launcher.

    At most `max_jobs` share a step (None: as many as fit into memory), in `worker_count` processes (None: one for each
    GPU). Raises KeyboardInterrupt if Ctrl-C stopped some."""
    quiet_libraries()
    setup_globals()
    job_returns = {number: sweep.run(number, overrides, _prepare_job) for number, overrides in jobs}
    points = [job.return_value for job in job_returns.values() if isinstance(job.return_value, Point)]
    if points:
        _train(sweep, points, max_jobs, worker_count)
    for point in points:
        score = score_of(read_result(point.folder)) if point.is_done() else None
        job_returns[point.number].return_value = score
    return list(job_returns.values())


def _train(sweep: SweepContext, points: Sequence[Point], max_jobs: int | None, worker_count: int | None) -> None:
    places = workers.places(worker_count, {point.config.device for point in points})
    make_groups = partial(_groups, [point.config for point in points], max_jobs, len(places))
    groups = workers.run_in_process(make_groups) if len(places) > 1 else make_groups()
    members = [[points[i] for i in group.jobs] for group in groups]
    if len(places) == 1 or len(groups) == 1:
        for group, together in zip(groups, members, strict=True):
            if len(together) == 1:
                print(f"\n{_describe(group, together)}", flush=True)
            _run_group(together, sweep)
        return
    print(f"{len(groups)} groups for {len(places)} workers, which take the next one when they are free:")
    print("\n".join(f"  {_describe(*pair)}" for pair in zip(groups, members, strict=True)), flush=True)
    workers.run_tasks(
        [partial(_run_in_worker, together, sweep) for together in members],
        places,
        lambda i, gpu: print(f"{_label(members[i])} starts{'' if gpu is None else f' on GPU {gpu}'}", flush=True),
        lambda i, exit_code: _on_worker_end(members[i], exit_code, sweep.folder),
        sweep.folder / STOP_FILE,
    )
    if not all(point.is_done() or point.has_failed() for point in points):
        raise KeyboardInterrupt("stopped")  # only a worker received the signal


def _groups(configs: Sequence[schema.Config], max_jobs: int | None, worker_count: int) -> "list[Group]":
    quiet_libraries()
    from lora_lab.launch.grouping import groups

    return groups(configs, max_jobs, worker_count)


def _describe(group: "Group", points: Sequence[Point]) -> str:
    if len(points) > 1:
        return f"{_label(points)} train together"
    return f"{_label(points)} trains alone{group.why and f', since {group.why}'}"


def _label(points: Sequence[Point]) -> str:
    """The numbers of jobs: "#0,2-4" for 0, 2, 3 and 4."""
    parts: list[list[int]] = []
    for point in points:
        if parts and point.number == parts[-1][-1] + 1:
            parts[-1].append(point.number)
        else:
            parts.append([point.number])
    return "#" + ",".join(f"{part[0]}-{part[-1]}" if len(part) > 2 else ",".join(map(str, part)) for part in parts)


def _run_in_worker(points: Sequence[Point], sweep: SweepContext) -> None:
    """`_run_group` in a new process, which knows nothing of Hydra's configuration yet."""
    os.chdir(sweep.config.hydra.runtime.cwd)
    prepare_process()
    quiet_libraries()
    config.register()
    setup_globals()
    JobRuntime.instance().set("name", sweep.config.hydra.job.name)
    with labelled_output(f"{_label(points)} "):
        sweep.configure_log()
        _run_group(points, sweep)


def _run_group(points: Sequence[Point], sweep: SweepContext) -> None:
    """Run the jobs of a group; their results and errors are in their folders."""
    if len(points) == 1:
        (point,) = points
        sweep.run(point.number, point.overrides, sweep.task)
        return
    with _log_of_each(points):
        _train_together(points, sweep.folder)
    sweep.configure_log()


def _on_worker_end(points: Sequence[Point], exit_code: int, sweep: Path) -> None:
    """Record a failure for jobs whose worker died, because it could not do so itself."""
    if exit_code == 0 or (sweep / STOP_FILE).exists():
        return
    how = f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})" if exit_code < 0 else "broke off"
    for point in points:
        if not point.is_done() and not point.has_failed():
            error = RunError(f"its process {how}; resume= of the sweep continues it")
            fail(point.folder, point.overrides, error)
    rewrite_page(sweep)


def _prepare_job(cfg: DictConfig) -> Point | float | None:
    """The task of a job before it is trained: the job, or the score of one that is done, or None if it cannot start."""
    hydra = HydraConfig.get()
    folder, number, overrides = Path(hydra.runtime.output_dir), hydra.job.num, config.plain(hydra.overrides.task)
    try:
        if result := sweeps.finished_result(folder, number, overrides):
            say(f"{display_path(folder)} is done")
            return score_of(result)
        settings = job_settings(config.typed(cfg), Path(hydra.sweep.dir))
        refuse_unwritable(folder)
        settings.resume = None if sweeps.recorded_overrides(folder, number) is None else str(folder)
        return Point(number, folder, overrides, settings)
    except Exception as error:
        fail(folder, overrides, error)
        return None


@contextmanager
def _log_of_each(points: Sequence[Point]) -> Iterator[None]:
    """Within the context log lines go into the log of every job, because they are about all of them."""
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    files = [logging.FileHandler(point.folder / "lora_lab.log", encoding="utf-8") for point in points]
    for file in files:
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    try:
        root.handlers = [*files]
        yield
    finally:
        root.handlers = handlers
        for file in files:
            file.close()


def _train_together(points: Sequence[Point], sweep: Path) -> None:
    from lora_lab.training.pack import train_pack

    ended: set[int] = set()

    def on_end(point: Point, result: "TrainResult | None", error: Exception | None) -> None:
        ended.add(point.number)
        if error is not None:
            fail(point.folder, point.overrides, error)
        else:
            write_result(point.folder, result)
            score = score_of(read_result(point.folder))
            say(f"#{point.number} is done{'' if score is None else f', score {score:.3f}'}")
        rewrite_page(sweep)

    try:
        with ExitStack() as locks:
            for point in points:
                locks.enter_context(claimed(point.folder, JOB_SECONDS))
                if point.config.resume:
                    resume_in(point.config, point.folder)
                sweeps.record_start(point.folder, point.number, point.overrides)
            trainings = _resolve(points, on_end)
            if trainings:
                pack = [point for point in points if point.number in trainings]
                train_pack(list(trainings.values()), lambda i, *end: on_end(pack[i], *end))
    except Exception as error:  # in what the jobs share, so none can continue
        for point in points:
            if point.number not in ended:
                fail(point.folder, point.overrides, error)
    finally:
        rewrite_page(sweep)


def _resolve(points: Sequence[Point], on_end: Callable[..., None]) -> "dict[int, ResolvedTraining]":
    """The trainings of `points` by their numbers, without those that are refused; their common images are read once."""
    from lora_lab.training.resolve import resolve_run

    trainings: dict[int, ResolvedTraining] = {}
    for point in points:
        first = next(iter(trainings.values()), None)
        try:
            trainings[point.number] = resolve_run(point.config, point.folder, first)
        except InputError as error:
            on_end(point, None, error)
    return trainings
