"""Train a LoRA: plan, load, learn, save, and only then look."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
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
from lora_lab.sweeps.packing import followed
from lora_lab.training.data import caption_texts, count_buckets, encode_dataset
from lora_lab.training.loop import train_steps
from lora_lab.training.loss import objective
from lora_lab.training.memory import explained, explained_together
from lora_lab.training.pack import Pack, shell
from lora_lab.training.plan import Plan, describe, describe_together, make_plan
from lora_lab.training.prior import prior_data
from lora_lab.training.run import METRICS, Base, Run, TrainResult
from lora_lab.training.start import start_job
from lora_lab.training.state import load_checkpoint
from lora_lab.training.step import Job
from lora_lab.training.text import begin_text


def train(config: Config, folder: Path) -> TrainResult:
    """Train `config.stage` (a Train) into `folder`. Raises InputError before the base is loaded."""
    began = time.perf_counter()
    plan = planned(config, folder)
    say(describe(plan, config, folder))
    with explained(config, folder):
        base = base_of(config, plan, folder)
        job, done = started(config, plan, base)
        with Run(config, plan, folder, job, base, done, began) as run:
            carry_out([run], base)
            if run.left:
                raise KeyboardInterrupt(
                    f"stopped after step {run.reached}; go on with: python -m lora_lab resume={folder}"
                )
            return run.finish()


def train_together(
    asked: Sequence[tuple[Config, Path]], ended: Callable[[int, Run | None, Exception | None], None]
) -> None:
    """Train several into their folders, on one base and with every step in common; they differ in what is a job's own.

    `ended(number, run, error)` is called for each that is done or has failed. Raises KeyboardInterrupt where Ctrl-C
    stopped some."""
    began, plans = time.perf_counter(), {}
    for i, (config, folder) in enumerate(asked):
        try:
            plans[i] = planned(config, folder)
        except InputError as error:
            ended(i, None, error)
    if not plans:
        return
    seeds = list(dict.fromkeys(asked[i][0].seed for i in plans))
    if len(seeds) > 1 and len(count_buckets(plans[min(plans)].pictures)) > 1:  # they would meet in different sizes
        for seed in seeds:
            its = [i for i in plans if asked[i][0].seed == seed]
            train_together([asked[i] for i in its], lambda i, *how, its=its: ended(its[i], *how))
        return
    of_all, folder = asked[min(plans)]
    say(describe_together({asked[i][1].name: asked[i][0] for i in plans}, plans[min(plans)], folder))
    with explained_together(len(plans)):
        base = base_of(of_all, plans[min(plans)], folder)
        leaders = dict(zip(plans, followed([asked[i][0] for i in plans]), strict=True))
        order = list(plans)
        jobs: dict[int, tuple[Job, int]] = {}
        with ExitStack() as stack:
            runs = []
            for i, plan in plans.items():
                config, folder = asked[i]
                leader = order[leaders[i]]
                if plan.goes_on or plans[leader].goes_on:  # each from where it was stopped
                    leader = i
                if leader not in jobs:
                    jobs[leader] = started(asked[leader][0], plans[leader], base, alone=False)
                job, done = jobs[leader]
                run = Run(config, plan, folder, job, base, done, began, partial(ended, i))
                runs.append(stack.enter_context(run))
            carry_out(runs, base, partial(Pack, memory=of_all.memory, compiled=of_all.compile, cache=of_all.cache))
            left = [run for run in runs if run.left]
            for run in runs:
                if run.error is None and run.result is None and not run.left:
                    run.finish()
        if left:
            raise KeyboardInterrupt(f"stopped after step {max(run.reached for run in left)}")


def planned(config: Config, folder: Path) -> Plan:
    """What will be done, and with what, which is written down."""
    if not config.resume:
        refuse_used(folder, METRICS)
    plan = make_plan(config, folder)
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
    """The steps of `runs`; those that Ctrl-C, or the end of the memory, stops leave a checkpoint."""
    for run in runs:
        run.begin()
    try:
        train_steps(runs, base, packed)
    except torch.OutOfMemoryError:  # of a size of pictures that had not come before, say
        for run in runs:
            if run.left:
                run.settle()
                run.checkpoint()
        raise
    for run in runs:
        if run.left:
            run.checkpoint()
