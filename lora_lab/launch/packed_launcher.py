"""hydra/launcher=packed: jobs that differ only in how a LoRA is trained share one base and every step on it.

Every job leaves what it would have left alone, and several GPUs each take a group of them at a time. Imports nothing
heavy: Hydra is told of it at every start."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobRuntime, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from lora_lab.board.hook import rewrite_page
from lora_lab.console import quiet_libraries, say, speak_as
from lora_lab.errors import InputError, RunError
from lora_lab.launch import config, job, stopping, workers
from lora_lab.launch import sweep_folder as sweeps
from lora_lab.runs import refuse_unwritable, write_json
from lora_lab.settings import schema

if TYPE_CHECKING:
    from lora_lab.launch.grouping import Group
    from lora_lab.training.resolve import ResolvedTraining
    from lora_lab.training.run import TrainResult


def register() -> None:
    """Tell Hydra about the launcher; its keys are the schema's. Hydra takes one from a module of hydra_plugins alone,
    which is made here."""
    place = PackedLauncher.__module__
    try:
        parent = import_module("hydra_plugins")
    except ImportError:  # no other plugin is installed
        parent = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        parent.__path__ = []
    parent.lora_lab = sys.modules[place] = ModuleType(place)
    parent.lora_lab.PackedLauncher = PackedLauncher
    Plugins.instance().register(PackedLauncher)


@dataclass(frozen=True)
class Point:
    """A job as it was asked for."""

    number: int
    folder: Path
    overrides: list[str]
    config: schema.Config


@dataclass(frozen=True)
class Sweep:
    """What Hydra knows of a sweep, and a job of it needs in any process."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction

    @property
    def folder(self) -> Path:
        return Path(self.config.hydra.sweep.dir)

    def run(self, number: int, overrides: Sequence[str], task: TaskFunction) -> JobReturn:
        """`task` as a job of Hydra's, with its folder, its record and its log."""
        composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        try:
            return run_job(
                hydra_context=self.context,
                task_function=task,
                config=composed,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        finally:
            self.speak()

    def speak(self) -> None:
        """Log as Hydra does between jobs."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)


class PackedLauncher(Launcher):
    __module__ = "hydra_plugins.lora_lab"

    def __init__(self, max_jobs: int | None, workers: int | None) -> None:
        self._most, self._workers = max_jobs, workers

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._sweep = Sweep(hydra_context, config, task_function)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        quiet_libraries()
        setup_globals()
        jobs = list(enumerate(job_overrides, start=initial_job_idx))
        returned = {number: self._sweep.run(number, overrides, _looked_at) for number, overrides in jobs}
        points = [each.return_value for each in returned.values() if isinstance(each.return_value, Point)]
        if points:
            self._train(points)
        for point in points:
            result = sweeps.result_of(point.folder) if _done(point) else None
            returned[point.number].return_value = result and sweeps.score_of(result)
        return list(returned.values())

    def _train(self, points: Sequence[Point]) -> None:
        places = workers.places(self._workers, {point.config.device for point in points})
        group = partial(_groups, [point.config for point in points], self._most, len(places))
        groups = workers.elsewhere(group) if len(places) > 1 else group()
        its = [[points[i] for i in group.jobs] for group in groups]
        if len(places) == 1 or len(groups) == 1:
            for group, together in zip(groups, its, strict=True):
                if len(together) == 1:
                    print(f"\n{_how(group, together)}", flush=True)
                _carry_out(together, self._sweep)
            return
        print(f"{len(groups)} groups for {len(places)} workers, the next for whoever is free:")
        print("\n".join(f"  {_how(*each)}" for each in zip(groups, its, strict=True)), flush=True)
        workers.spread(
            [partial(_in_a_worker, together, self._sweep) for together in its],
            places,
            lambda i, gpu: print(f"{_names(its[i])} {'begins' if gpu is None else f'begins on GPU {gpu}'}", flush=True),
            lambda i, exit_code: _over(its[i], exit_code, self._sweep.folder),
            self._sweep.folder / sweeps.STOP,
        )
        if any(not _done(point) and not (point.folder / "failed.json").is_file() for point in points):
            raise KeyboardInterrupt("stopped")  # a worker alone was told to


def _groups(configs: Sequence[schema.Config], most: int | None, workers: int) -> "list[Group]":
    quiet_libraries()
    from lora_lab.launch.grouping import groups

    return groups(configs, most, workers)


def _how(group: "Group", points: Sequence[Point]) -> str:
    if len(points) > 1:
        return f"{_names(points)} train together"
    return f"{_names(points)} trains alone{group.why and f', since {group.why}'}"


def _names(points: Sequence[Point]) -> str:
    """#0,2-4 of jobs 0, 2, 3 and 4."""
    parts: list[list[int]] = []
    for point in points:
        if parts and point.number == parts[-1][-1] + 1:
            parts[-1].append(point.number)
        else:
            parts.append([point.number])
    return "#" + ",".join(f"{part[0]}-{part[-1]}" if len(part) > 2 else ",".join(map(str, part)) for part in parts)


def _in_a_worker(points: Sequence[Point], sweep: Sweep) -> None:
    """`_carry_out` in a process that knows nothing yet."""
    os.chdir(sweep.config.hydra.runtime.cwd)
    job.prepare_process()
    quiet_libraries()
    config.register()
    register()
    setup_globals()
    JobRuntime.instance().set("name", sweep.config.hydra.job.name)
    sweep.speak()
    speak_as(f"{_names(points)} ")
    _carry_out(points, sweep)


def _carry_out(points: Sequence[Point], sweep: Sweep) -> None:
    """Do the jobs of a group. What comes of them stands in their folders."""
    if len(points) == 1:
        (point,) = points
        sweep.run(point.number, point.overrides, sweep.task)
        return
    with _logged(points):
        _train_together(points, sweep.folder)
    sweep.speak()


def _over(points: Sequence[Point], exit_code: int, sweep: Path) -> None:
    """A worker has ended. Of one that died nobody else tells why its jobs are not done."""
    if exit_code == 0 or (sweep / sweeps.STOP).exists():
        return
    how = f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})" if exit_code < 0 else "broke off"
    for point in points:
        if not _done(point) and not (point.folder / "failed.json").is_file():
            error = RunError(f"its process {how}; it goes on with resume= of the sweep")
            job.failed(point.folder, point.overrides, error)
    rewrite_page(sweep)


def _done(point: Point) -> bool:
    known = sweeps.begun(point.folder, point.number)
    return known == sorted(point.overrides) and sweeps.result_of(point.folder) is not None


def _looked_at(cfg: DictConfig) -> Point | float | None:
    """A job before it begins; of one that is done its score, and None of one that cannot begin."""
    settings = HydraConfig.get()
    folder, number, overrides = Path(settings.runtime.output_dir), settings.job.num, list(settings.overrides.task)
    try:
        begun = sweeps.begun(folder, number)
        if begun == sorted(overrides) and (result := sweeps.result_of(folder)):
            say(f"{folder} is done")
            return sweeps.score_of(result)
        typed = job.settled(config.typed(cfg), Path(settings.sweep.dir))
        refuse_unwritable(folder)
        typed.resume = None if begun is None else str(folder)
        return Point(number, folder, overrides, typed)
    except Exception as error:
        job.failed(folder, overrides, error)
        return None


@contextmanager
def _logged(points: Sequence[Point]) -> Iterator[None]:
    """Within the context what is said goes into the log of each: it is about all of them."""
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    files = [logging.FileHandler(point.folder / "lora_lab.log", encoding="utf-8") for point in points]
    for file in files:
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    try:
        root.handlers = [*files]
        yield
    finally:
        root.handlers = before
        for file in files:
            file.close()


def _train_together(points: Sequence[Point], sweep: Path) -> None:
    from lora_lab.training.pack_runner import train_pack

    over: list[int] = []
    points_of = {point.number: point for point in points}

    def ended(point: Point, result: "TrainResult | None", error: Exception | None) -> None:
        over.append(point.number)
        if error is not None:
            job.failed(point.folder, point.overrides, error)
        else:
            write_json(point.folder / "result.json", asdict(result))
            score = sweeps.score_of(sweeps.result_of(point.folder))
            say(f"#{point.number} is done{'' if score is None else f', score {score:.3f}'}")
        rewrite_page(sweep)

    stopping.stop_with(sweep / sweeps.STOP)
    try:
        with ExitStack() as stack:
            for point in points:
                stack.enter_context(sweeps.held(point.folder))
                if point.config.resume:
                    job.go_on(point.config, point.folder)
                sweeps.begin(point.folder, point.number, point.overrides)
            resolved = _resolved(points, ended)
            if resolved:
                pack = list(resolved)
                train_pack(list(resolved.values()), lambda i, *end: ended(points_of[pack[i]], *end))
    except Exception as error:  # of what they share: nobody can go on
        for point in points:
            if point.number not in over:
                job.failed(point.folder, point.overrides, error)
    finally:
        stopping.stop_with(None)
        rewrite_page(sweep)


def _resolved(points: Sequence[Point], ended: Callable[..., None]) -> "dict[int, ResolvedTraining]":
    """The trainings of `points` by number, without those that are refused; the images, which they share, are read
    once."""
    from lora_lab.training.resolve import resolve_run

    resolved: dict[int, ResolvedTraining] = {}
    for point in points:
        first = next(iter(resolved.values()), None)
        try:
            resolved[point.number] = resolve_run(point.config, point.folder, first)
        except InputError as error:
            ended(point, None, error)
    return resolved
