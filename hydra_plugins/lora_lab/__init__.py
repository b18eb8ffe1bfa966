"""Hydra's plugin for `hydra/launcher=packed`; the work is done by lora_lab/launch/packed_launcher.py.

Hydra takes launchers only from packages of the namespace `hydra_plugins`, and it imports all of them at the start of
every Hydra program in the environment. So this module imports nothing but Hydra, and `hydra_plugins` has no
__init__.py."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class PackedLauncher(Launcher):
    """Train the jobs of a sweep that can share a base model as one pack. The keys are those of `hydra.launcher`."""

    def __init__(self, max_jobs: int | None, workers: int | None) -> None:
        self.max_jobs, self.workers = max_jobs, workers

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra's sweeper hands over."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run one job for each list of overrides, numbered from `initial_job_idx`."""
        from lora_lab.launch import packed_launcher

        sweep = packed_launcher.SweepContext(self.hydra_context, self.config, self.task_function)
        jobs = list(enumerate(job_overrides, start=initial_job_idx))
        return packed_launcher.launch(sweep, jobs, self.max_jobs, self.workers)
