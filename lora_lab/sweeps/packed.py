"""hydra/launcher=packed: jobs that differ only in how a LoRA is trained share one base and every step on it.

Every job leaves what it would have left alone. Imports nothing heavy: Hydra is told of it at every start."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from lora_lab import config, job, schema, stopping
from lora_lab.board.hook import rewrite_page
from lora_lab.console import quiet_libraries, say
from lora_lab.runs import refuse_unwritable, write_json
from lora_lab.sweeps import folder as sweeps

if TYPE_CHECKING:
    from lora_lab.training.run import Run


def register() -> None:
    """Tell Hydra about the launcher. It takes one from a module of hydra_plugins alone, which is made here."""
    place = PackedLauncher.__module__
    try:
        parent = import_module("hydra_plugins")
    except ImportError:  # no other plugin is installed
        parent = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        parent.__path__ = []
    parent.lora_lab = sys.modules[place] = ModuleType(place)
    parent.lora_lab.PackedLauncher = PackedLauncher
    Plugins.instance().register(PackedLauncher)
    target = f"{place}.{PackedLauncher.__name__}"
    ConfigStore.instance().store(
        group="hydra/launcher", name="packed", node={"_target_": target, "max_jobs": None}, provider="lora_lab"
    )


@dataclass(frozen=True)
class Point:
    """A job as it was asked for."""

    number: int
    folder: Path
    overrides: list[str]
    config: schema.Config
    begun: bool


class PackedLauncher(Launcher):
    __module__ = "hydra_plugins.lora_lab"

    def __init__(self, max_jobs: int | None) -> None:
        self._most = max_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        quiet_libraries()
        from lora_lab.sweeps.packing import alone, groups

        setup_globals()
        jobs = list(enumerate(job_overrides, start=initial_job_idx))
        returned = {number: self._run(number, overrides, _looked_at) for number, overrides in jobs}
        points = [each.return_value for each in returned.values() if isinstance(each.return_value, Point)]
        for numbers in groups([point.config for point in points], self._most):
            together = [points[i] for i in numbers]
            if len(together) > 1:
                with _logged(together):
                    scores = _train(together, Path(self._config.hydra.sweep.dir))
                configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
                for point in together:
                    returned[point.number] = _return(returned[point.number], scores.get(point.number))
                continue
            (point,) = together
            why = alone(point.config) or "no other job has its base, its data and its layers"
            say(f"\n#{point.number} trains alone, since {why}")
            returned[point.number] = self._run(point.number, point.overrides, self._task)
        return list(returned.values())

    def _run(self, number: int, overrides: Sequence[str], task: TaskFunction) -> JobReturn:
        """`task` as a job of Hydra's, with its folder, its record and its log."""
        composed = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = composed.hydra.job.num = number
        try:
            return run_job(
                hydra_context=self._context,
                task_function=task,
                config=composed,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        finally:
            configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)


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
        return Point(number, folder, overrides, typed, begun is not None)
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


def _return(before: JobReturn, score: float | None) -> JobReturn:
    before.status, before.return_value = JobStatus.COMPLETED, score
    return before


def _train(points: Sequence[Point], sweep: Path) -> dict[int, float | None]:
    """Train them together; the scores of those that have one, by their numbers."""
    from lora_lab.stages.train import train_together

    scores: dict[int, float | None] = {}

    def ended(i: int, run: "Run | None", error: Exception | None) -> None:
        point = points[i]
        if error is not None:
            job.failed(point.folder, point.overrides, error)
        else:
            write_json(point.folder / "result.json", asdict(run.result))
            (point.folder / "failed.json").unlink(missing_ok=True)
            scores[point.number] = sweeps.score_of(sweeps.result_of(point.folder))
            said = scores[point.number]
            say(f"#{point.number} is done{'' if said is None else f', score {said:.3f}'}")
        rewrite_page(sweep)

    stopping.stop_with(sweep / sweeps.STOP)
    try:
        with ExitStack() as stack:
            for point in points:
                stack.enter_context(sweeps.held(point.folder))
                if point.begun:
                    job.go_on(point.config, point.folder)
                sweeps.begin(point.folder, point.number, point.overrides)
            train_together([(point.config, point.folder) for point in points], ended)
    except Exception as error:  # of what they share: nobody can go on
        for point in points:
            if point.number not in scores and not (point.folder / "failed.json").is_file():
                job.failed(point.folder, point.overrides, error)
    finally:
        stopping.stop_with(None)
        rewrite_page(sweep)
    return scores
