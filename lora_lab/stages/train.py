"""Train a LoRA: plan, load, learn, save, and only then look."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from lora_lab.adapters.inject import load_adapter_weights
from lora_lab.adapters.tokens import tokenizers_of
from lora_lab.base.cache import Cache
from lora_lab.base.encode import Encoder
from lora_lab.base.load import load_base
from lora_lab.base.quantize import quantize_
from lora_lab.console import say
from lora_lab.evaluation.scores import ScorePrompts, Scorer
from lora_lab.runs import refuse_used, write_manifest
from lora_lab.settings.schema import Config
from lora_lab.training.build import build_training
from lora_lab.training.checkpoint import load_checkpoint
from lora_lab.training.data import caption_texts, encode_dataset
from lora_lab.training.loop import apart, train_steps
from lora_lab.training.loss import objective
from lora_lab.training.memory import free_gpu_memory, gc_paused, out_of_memory_error
from lora_lab.training.pack import Pack, clone_sharing_weights
from lora_lab.training.plan import Plan, describe, make_plan
from lora_lab.training.prior import prior_data
from lora_lab.training.run import METRICS, Base, Run, TrainResult
from lora_lab.training.step import Job
from lora_lab.training.text_encoders import inject_text_adapters


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
        raise out_of_memory_error(config, folder) from error


def planned(config: Config, folder: Path, like: Plan | None = None) -> Plan:
    """What will be done, and with what, which is written down; see make_plan for `like`."""
    if not config.resume:
        refuse_used(folder, METRICS)
    plan = make_plan(config, folder, like)
    write_manifest(folder, plan.device, plan.hashes)
    return plan


def base_of(config: Config, plan: Plan, folder: Path) -> Base:
    """Load the base, and look at and encode what is to be learnt."""
    free_gpu_memory(plan.device)
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of an earlier job in this process
    references = [fitted.picture for fitted in plan.pictures]
    scorer = None
    if config.model.judge:
        prompts = ScorePrompts.of(config.score, config.trigger, config.class_noun)
        scorer = Scorer.load(
            prompts, config.model, config.captioner, config.refiner, config.trigger, references, plan.compared,
            plan.device,
        )  # fmt: skip
    base = load_base(config.model, plan.device, waiting=True)  # modules are moved to the GPU one at a time
    if config.memory.vae_tiling:
        base.enable_tiling(config.model.resolution // 2)
    base.apply_loss(config.loss)
    tokenizers = tokenizers_of(base, config.trigger, config.text.tokens) if config.text.learns else None
    encoder = Encoder(base, plan.device, Cache(config.cache and Path(config.cache)), True, tokenizers)
    data = measured = encode_dataset(plan.samples, plan.crops, plan.texts, config.dataset.flip, encoder)
    if plan.held_out:
        cuts = [[fitted] for fitted in plan.held_out_pictures]
        texts = [caption_texts(s.captions[:1], config.dataset, config.trigger) for s in plan.held_out]
        measured = encode_dataset(plan.held_out, cuts, texts, False, encoder)
    quantize_(base.network, config.memory.linear_weights, config.memory.convolution_weights, plan.device)
    prior = prior_data(
        config.prior, config.trigger, data, plan.texts, plan.class_samples, plan.class_pictures, config.model,
        plan.render, encoder,
    )  # fmt: skip
    if config.text.learns:  # then what a text is changes with every step
        encoder = replace(encoder, tokenizers=None, cache=Cache(None))
    before = scorer and scorer.score_base(plan.render, folder, encoder)
    return Base(encoder, data, prior, measured, scorer, before)


def started(config: Config, plan: Plan, base: Base, alone: bool = True) -> tuple[Job, int]:
    """The job, from where it begins or goes on; and how many steps it has done. One that is not `alone` leaves the
    base's UNet as it is."""
    model = base.encoder.base
    asked = objective(config.loss, model)
    with gc_paused():
        unet = model.network if alone else clone_sharing_weights(model.network)
        read = inject_text_adapters(model, plan.device, config.text, config.trigger, config.seed, plan.adapter)
        job = build_training(unet, asked, config, plan, read, alone, base.encoder.graphs)
    if plan.goes_on:
        return job, load_checkpoint(plan.goes_on, job)
    if plan.start:
        with job.learnt.exact():
            load_adapter_weights(model, plan.start)
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
