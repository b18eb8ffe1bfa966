"""Several jobs trained on one base, with every step in common: in one pack, or in as many as the memory asks for."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.settings.schema import Config
from lora_lab.stages.train import base_of, carry_out, kept, planned, started
from lora_lab.training.checkpoint import checkpoints
from lora_lab.training.data import count_buckets
from lora_lab.training.loop import apart
from lora_lab.training.memory import free_gpu_memory, out_of_memory_error
from lora_lab.training.pack import Pack
from lora_lab.training.plan import Plan, courses, describe_together, evenly
from lora_lab.training.run import Base, Run


@dataclass(frozen=True)
class Asked:
    """A run among several."""

    config: Config
    folder: Path
    plan: Plan


Ended = Callable[[int, Run | None, Exception | None], None]


def train_together(asked: Sequence[tuple[Config, Path]], ended: Ended) -> None:
    """Train several into their folders, on one base and with every step in common; they differ in what is a job's own.

    Where the memory ends they go on in smaller packs, one after the other. `ended(number, run, error)` is called for
    each that is done or has failed. Raises KeyboardInterrupt where Ctrl-C stopped some."""
    began, jobs = time.perf_counter(), _planned_together(asked, ended)
    if not jobs:
        return

    def over(i: int, run: Run | None, error: Exception | None) -> None:
        del jobs[i]
        ended(i, run, error)

    def too_large(numbers: Sequence[int]) -> None:
        for i in numbers:
            over(i, None, out_of_memory_error(jobs[i].config, jobs[i].folder))

    first = jobs[min(jobs)]
    say(describe_together({job.folder.name: job.config for job in jobs.values()}, first.plan, first.folder))
    try:
        base = base_of(first.config, first.plan, first.folder)
    except torch.OutOfMemoryError:  # no fewer jobs would help
        return too_large(list(jobs))
    waiting, most = _alike_in_size(jobs), len(jobs)
    while waiting:
        numbers = waiting.pop(0)
        shared = [[numbers[k] for k in course] for course in courses([jobs[i].config for i in numbers])]
        if len(shared) > most:
            waiting[:0] = [list(chain.from_iterable(part)) for part in evenly(shared, most)]
        elif not _fits({i: jobs[i] for i in numbers}, shared, base, began, over):
            if len(shared) == 1:
                too_large([i for i in numbers if i in jobs])
                continue
            most = -(-len(shared) // 2)
            say(f"the GPU's memory is not enough for {len(shared)} LoRAs at once: they go on at most {most} at a time")
            left = [i for i in numbers if i in jobs]
            jobs |= {i: _going_on(jobs[i]) for i in left}
            waiting[:0] = [left] if left else []


def _planned_together(asked: Sequence[tuple[Config, Path]], ended: Ended) -> dict[int, Asked]:
    """By their numbers; the pictures, which they have in common, are read once."""
    jobs: dict[int, Asked] = {}
    for i, (config, folder) in enumerate(asked):
        like = next((job.plan for job in jobs.values()), None)
        try:
            jobs[i] = Asked(config, folder, planned(config, folder, like))
        except InputError as error:
            ended(i, None, error)
    return jobs


def _alike_in_size(jobs: Mapping[int, Asked]) -> list[list[int]]:
    """The jobs that meet in pictures of one size: of several sizes each seed has an order of its own."""
    several, found = len(count_buckets(jobs[min(jobs)].plan.pictures)) > 1, {}
    for i, job in jobs.items():
        found.setdefault(job.config.seed if several else 0, []).append(i)
    return list(found.values())


def _fits(jobs: Mapping[int, Asked], shared: Sequence[Sequence[int]], base: Base, began: float, over: Ended) -> bool:
    """Train in one pack those that `shared` has, courses of training with the longest job first.

    False if the memory was not enough. Then nothing of the pack is held any more: an error would hold it."""
    of_all = jobs[min(jobs)].config
    packed = partial(
        Pack, memory=of_all.memory, compiled=of_all.compile, cache=of_all.cache, graphs=base.encoder.graphs
    )
    free_gpu_memory(base.encoder.device)
    try:
        with ExitStack() as stack:
            runs = []
            for course in shared:
                job, done = started(jobs[course[0]].config, jobs[course[0]].plan, base, alone=False)
                for i in course:
                    its = jobs[i]
                    run = Run(its.config, its.plan, its.folder, job, base, done, began, partial(over, i))
                    runs.append(stack.enter_context(run))
            with kept(runs):
                carry_out(runs, base, packed)
                left = [run for run in runs if run.left]
                for run in runs:
                    if run.error is None and run.result is None and not run.left:
                        with apart(run, packed):
                            run.finish()
    except torch.OutOfMemoryError:
        return False
    if left:
        raise KeyboardInterrupt(f"stopped after step {max(run.reached for run in left)}")
    return True


def _going_on(job: Asked) -> Asked:
    """From its newest checkpoint; from the beginning if it has none."""
    newest = next(reversed(checkpoints(job.folder)), None)
    return Asked(replace(job.config, resume=str(job.folder)), job.folder, replace(job.plan, goes_on=newest))
