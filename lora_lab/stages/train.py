"""Train a LoRA: plan, load, learn, save, and only then look."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from lora_lab.adapters.fresh import begin_with
from lora_lab.adapters.tokens import tokenizers_of
from lora_lab.base.cache import Cache
from lora_lab.base.encode import Encoder
from lora_lab.base.load import load_base, tile_vae
from lora_lab.base.prediction import settle
from lora_lab.base.stored import store
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.evaluation import Evaluation
from lora_lab.runs import refuse_used, write_manifest
from lora_lab.schema import Config
from lora_lab.training.data import caption_texts, count_buckets, encode_dataset
from lora_lab.training.loop import apart, train_steps
from lora_lab.training.loss import objective
from lora_lab.training.memory import not_enough
from lora_lab.training.pack import Pack, shell
from lora_lab.training.plan import Plan, courses, describe, describe_together, evenly, make_plan
from lora_lab.training.prior import prior_data
from lora_lab.training.run import METRICS, Base, Run, TrainResult
from lora_lab.training.start import start_job
from lora_lab.training.state import checkpoints, load_checkpoint
from lora_lab.training.step import Job
from lora_lab.training.text import begin_text


def train(config: Config, folder: Path) -> TrainResult:
    """Train `config.stage` (a Train) into `folder`. Raises InputError before the base is loaded."""
    began = time.perf_counter()
    plan = planned(config, folder)
    say(describe(plan, config, folder))
    try:
        base = base_of(config, plan, folder)
        job, done = started(config, plan, base)
        with Run(config, plan, folder, job, base, done, began) as run, kept([run]):
            carry_out([run], base)
            if run.left:
                raise KeyboardInterrupt(
                    f"stopped after step {run.reached}; go on with: python -m lora_lab resume={folder}"
                )
            return run.finish()
    except torch.OutOfMemoryError as error:
        raise not_enough(config, folder) from error


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
            over(i, None, not_enough(jobs[i].config, jobs[i].folder))

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
    packed = partial(Pack, memory=of_all.memory, compiled=of_all.compile, cache=of_all.cache)
    _let_go(base.encoder.device)
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


def _let_go(device: torch.device) -> None:
    """Of what earlier jobs in this process had."""
    gc.collect()  # networks and their hooks hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def planned(config: Config, folder: Path, like: Plan | None = None) -> Plan:
    """What will be done, and with what, which is written down; see make_plan for `like`."""
    if not config.resume:
        refuse_used(folder, METRICS)
    plan = make_plan(config, folder, like)
    write_manifest(folder, plan.device, plan.hashes)
    return plan


def base_of(config: Config, plan: Plan, folder: Path) -> Base:
    """Load the base, and look at and encode what is to be learnt."""
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of an earlier job in this process
    references = [fitted.picture for fitted in plan.pictures]
    evaluation = Evaluation(config, plan.device, references, plan.compared) if config.model.judge else None
    pipe = load_base(config.model, plan.device, waiting=True)  # each part has its turn, and then the UNet stays
    if config.memory.vae_tiling:
        tile_vae(pipe.vae, config.model.resolution // 2)
    settle(pipe, config.loss)
    tokenizers = tokenizers_of(pipe, config.trigger, config.text.tokens) if config.text.learns else None
    encoder = Encoder(pipe, plan.device, Cache(config.cache and Path(config.cache)), True, tokenizers)
    data = measured = encode_dataset(plan.samples, plan.crops, plan.texts, config.dataset.flip, encoder)
    if plan.held_out:
        cuts = [[fitted] for fitted in plan.held_out_pictures]
        texts = [caption_texts(s.captions[:1], config.dataset, config.trigger) for s in plan.held_out]
        measured = encode_dataset(plan.held_out, cuts, texts, False, encoder)
    store(pipe.unet, config.memory.linear_weights, config.memory.convolution_weights, plan.device)
    prior = prior_data(config, plan, data, encoder)
    if config.text.learns:  # then what a text is changes with every step
        encoder = replace(encoder, tokenizers=None, cache=Cache(None))
    before = evaluation and evaluation.begin(encoder, plan.hashes["base"], plan.dtype, folder)
    return Base(encoder, data, prior, measured, evaluation, before)


def started(config: Config, plan: Plan, base: Base, alone: bool = True) -> tuple[Job, int]:
    """The job, from where it begins or goes on; and how many steps it has done. One that is not `alone` leaves the
    base's UNet as it is."""
    pipe = base.encoder.pipe
    asked = objective(config.loss, pipe.scheduler.config)
    unet = pipe.unet if alone else shell(pipe.unet)
    job = start_job(unet, asked, config, plan, begin_text(pipe, plan.device, config, plan.adapter), alone)
    if plan.goes_on:
        return job, load_checkpoint(plan.goes_on, job)
    if plan.start:
        with job.learnt.exact():
            begin_with(pipe, plan.start)
        if job.average is not None:
            job.average.copy_(job.learnt.master.detach())
    return job, 0


def carry_out(runs: Sequence[Run], base: Base, packed: Callable[[Sequence[Job]], Pack] | None = None) -> None:
    """The steps of `runs`; those that Ctrl-C stops leave a checkpoint."""
    for run in runs:
        run.begin()
    train_steps(runs, base, packed)
    for run in runs:
        if run.left:
            run.checkpoint()


@contextmanager
def kept(runs: Sequence[Run]) -> Iterator[None]:
    """Within the context an end of the GPU's memory, at a size of pictures that had not come before, say, leaves a
    checkpoint of what was learnt."""
    try:
        yield
    except torch.OutOfMemoryError:
        for run in runs:
            if run.unkept:
                with apart(run, len(runs) > 1):
                    run.settle()
                    run.checkpoint()
        raise
