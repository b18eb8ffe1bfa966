"""Train a LoRA: plan, load, learn, save, and only then look."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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
from lora_lab.curves import loss_plot, read_metrics
from lora_lab.evaluation import Evaluation, numbers, table, write_lines
from lora_lab.runs import refuse_used, write_manifest
from lora_lab.schema import Config
from lora_lab.scoring import Scores
from lora_lab.track import Track, tracking
from lora_lab.training.data import TrainingData, caption_texts, encode_dataset
from lora_lab.training.keep import Keep, publish
from lora_lab.training.look import Look
from lora_lab.training.loop import MetricsFile, train_steps
from lora_lab.training.loss import objective
from lora_lab.training.memory import explained
from lora_lab.training.plan import Plan, describe, make_plan
from lora_lab.training.prior import PriorData, prior_data
from lora_lab.training.start import start_job
from lora_lab.training.state import load_checkpoint
from lora_lab.training.step import Job
from lora_lab.training.text import begin_text
from lora_lab.training.validation import validation_loss

VALIDATION = "validation.jsonl"  # beside metrics.jsonl, whose lines are steps


@dataclass(frozen=True)
class TrainResult:
    stage: str
    name: str
    trigger: str
    lora: str  # the finished file, in the run folder
    model: str | None  # its copy in models/lora, if it was published
    steps: int
    seconds: float  # wall time of this process, loading and drawing included
    loss: float  # mean of the last 50 steps
    validation_loss: float | None  # of the finished LoRA; None without stage.validation_loss_every
    scores_before: Scores | None  # of the base without the LoRA; None without model.judge
    scores: Scores | None  # docs/scores.md
    samples: dict[str, list[str]]  # step to its validation pictures


def train(config: Config, folder: Path) -> TrainResult:
    """Train `config.stage` (a Train) into `folder`. Raises InputError before the base is loaded."""
    began = time.perf_counter()
    if not config.resume:
        refuse_used(folder, "metrics.jsonl")
    plan = make_plan(config, folder)
    say(describe(plan, config, folder))
    write_manifest(folder, plan.device, plan.hashes)
    with explained(config, folder):
        return carried_out(plan, config, folder, began)


def carried_out(plan: Plan, config: Config, folder: Path, began: float) -> TrainResult:
    """What was planned, `began` being when the process's clock showed the start of it."""
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
    look = Look(encoder, config, folder)
    look.base(plan.hashes["base"], plan.dtype)
    before = evaluation and evaluation.begin(encoder, plan.hashes["base"], plan.dtype, folder)
    asked = objective(config.loss, pipe.scheduler.config)
    job = start_job(pipe.unet, asked, config, plan, begin_text(pipe, plan.device, config, plan.adapter))
    done = load_checkpoint(plan.goes_on, job) if plan.goes_on else 0
    if plan.start and not plan.goes_on:
        with job.learnt.exact():
            begin_with(pipe, plan.start)
        if job.average is not None:
            job.average.copy_(job.learnt.master.detach())
    # Tells the jobs of a sweep apart.
    shown = f"{config.name} rank {config.rank} lr {config.rate:g} steps {config.steps}"
    tracker = tracking(folder=folder, name=shown, config=asdict(config), resume=done > 0, **vars(config.tracker))
    with tracker as track:
        lora = learn(job, data, prior, measured, done, Keep(job, config, plan, folder), look, track)
        published = None if config.publish is False else str(publish(lora, config.name))
        scored = evaluation and evaluation.score(lora, folder / "samples" / "score", encoder)
        if scored:
            write_lines(folder, [before, scored])
            say(table([before, scored]))
            track.numbers(config.steps, numbers(scored.scores))
    return TrainResult(
        stage="train",
        name=config.name,
        trigger=config.trigger,
        lora=str(lora),
        model=published,
        steps=config.steps,
        seconds=round(time.perf_counter() - began, 1),
        loss=statistics.mean(line["loss"] for line in read_metrics(folder / "metrics.jsonl")[-50:]),
        validation_loss=read_metrics(folder / VALIDATION)[-1]["loss"] if config.stage.validation_loss_every else None,
        scores_before=before and before.scores,
        scores=scored and scored.scores,
        samples=look.samples(),
    )


def learn(
    job: Job,
    data: TrainingData,
    prior: PriorData | None,
    measured: TrainingData,
    done: int,
    keep: Keep,
    look: Look,
    track: Track,
) -> Path:
    """The loop from step `done` on, with what happens around its steps; returns the finished LoRA file."""
    stage, name = job.settings, keep.config.name
    metrics = MetricsFile(keep.folder / "metrics.jsonl", done)
    # The first and the last measurement stand outside the loop and are made again by whoever goes on from there.
    known = done if 0 < done < job.steps else done - 1
    measurements = MetricsFile(keep.folder / VALIDATION, known) if stage.validation_loss_every else None

    def due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0 and step < job.steps  # the last step has its turn after the loop

    def report(step: int, numbers: dict[str, float]) -> None:
        metrics.write(step, numbers)
        track.numbers(step, {f"train/{key}": value for key, value in numbers.items()})

    def measure(step: int) -> None:
        if measurements:
            loss = validation_loss(job, measured, stage.validation_timesteps)
            measurements.write(step, {"loss": loss})
            track.numbers(step, {"validation/loss": loss})

    reached, wait = done, lambda: None

    def after_step(step: int, settle: Callable[[], None]) -> None:
        nonlocal reached, wait
        reached, wait = step, settle
        if due(step, stage.validation_loss_every):
            settle()
            measure(step)  # before the checkpoint, so that whoever goes on from that has it
        if due(step, stage.checkpoint_every):
            settle()
            keep.checkpoint(step)
        if due(step, stage.validate_every):
            settle()
            track.images(step, look.validate(keep.lora(step, f"{name}-{step:06d}"), step))

    try:
        if done == 0:
            measure(0)
        reached = train_steps(job, data, prior, done, report, after_step)
        keep.checkpoint(reached)
        if reached == job.steps:
            measure(reached)
    except torch.OutOfMemoryError:  # of a size of pictures that had not come before, say
        wait()
        keep.checkpoint(reached)
        raise
    finally:
        metrics.close()
        if measurements:
            measurements.close()
        validation = read_metrics(measurements.path) if measurements else []
        loss_plot(read_metrics(metrics.path), validation, keep.folder / "loss.png")
    if reached < job.steps:
        raise KeyboardInterrupt(f"stopped after step {reached}; go on with: python -m lora_lab resume={keep.folder}")
    lora = keep.lora(reached, name)
    track.images(reached, look.validate(lora, reached))
    return lora
