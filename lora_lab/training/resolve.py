"""From the configuration to a resolved training: every input read and checked before the base model is loaded.

This is the last place that sees the whole configuration."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from PIL import Image

from lora_lab import track
from lora_lab.adapters import inject
from lora_lab.adapters.files import embeddings_path, read_tokens, resolve_lora
from lora_lab.base.layers import validate_quantization
from lora_lab.base.load import base_class, layer_shapes, pick_device, pick_dtype, validate_prediction
from lora_lab.base.locate import hash_model, locate_folder, locate_model
from lora_lab.console import say, say_once
from lora_lab.errors import InputError
from lora_lab.evaluation.scores import Pictures, held_out_pictures, validate_embedders
from lora_lab.images.dataset import Sample, find_masks, read_dataset, read_folders, require_trigger
from lora_lab.images.pixels import Fitted
from lora_lab.runs import (
    display_path,
    hash_files,
    hash_text,
    refuse_missing,
    refuse_unwritable,
    refuse_used,
    write_manifest,
)
from lora_lab.sampling.generate import RenderSettings, render_settings
from lora_lab.settings.schema import (
    Config,
    Dataset,
    Loss,
    Memory,
    Model,
    OptimizerTraits,
    Prior,
    Schedule,
    Score,
    Text,
    Tracker,
    Train,
    Triggers,
    training_fingerprint,
)
from lora_lab.settings.setting import bind_target, call_target
from lora_lab.training.data import caption_texts, crop_pictures, fit_pictures, text_warnings
from lora_lab.training.lora_training import newest_checkpoint, step_of, validate_fingerprint
from lora_lab.training.memory import TrainingSize
from lora_lab.training.prior import class_samples, hash_of
from lora_lab.training.text_encoders import validate_text

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"  # of every step, and of every measurement of validation loss
# Settings that a ResolvedTraining has as they are in the configuration.
COPIED = ("triggers", "class_noun", "name", "rank", "steps", "batch_size", "seed", "compile", "model", "dataset",
          "text", "loss", "prior", "schedule", "score", "captioner", "refiner", "memory", "tracker")  # fmt: skip
MakeOptimizer = Callable[[list], torch.optim.Optimizer]  # from parameters or groups of them


@dataclass(frozen=True)
class TrainingFiles:
    """The captions, and the images' and the base's files, as they were read."""

    samples: list[Sample]
    texts: list[list[list[str]]]  # of each sample and each of its captions: the orders of its tags
    held_out: list[Sample]  # of stage.validation_root; [] without one
    class_samples: list[Sample]  # of the prior; [] without class images
    hashes: dict[str, str]  # SHA-256 by what was hashed: base, dataset, captions, ...


@dataclass(frozen=True)
class TrainingImages:
    """The images themselves, fitted into their buckets, until they are encoded."""

    fitted: list[Fitted]  # of the samples, in their order, cut at the centre
    crops: list[list[Fitted]]  # what each sample is trained on
    held_out: list[Fitted]  # of the held-out samples
    references: Pictures  # that scores compare with instead of the training images; {} without held-out images
    class_images: list[Fitted]  # of the class samples that are on disk; prior=generated renders the others

    def free(self) -> None:
        """Free all images, 3 MB each at 1024 px: BaseContext has what is made of them."""
        for images in (self.fitted, self.crops, self.held_out, self.class_images, *self.references.values()):
            images.clear()


@dataclass(frozen=True)
class ResolvedTraining:
    """One training, all of whose inputs exist and fit together."""

    folder: Path
    triggers: Triggers
    class_noun: str
    name: str  # of the LoRA file
    lr: float  # the optimizer's own where its option sets one
    requested_lr: float  # the key lr, which an optimizer with its own learning rate does not use
    rank: int
    steps: int
    batch_size: int
    seed: int
    install: bool  # whether the finished LoRA is copied to models/lora
    cache: Path | None
    compile: str
    settings: Train
    model: Model
    dataset: Dataset
    text: Text
    loss: Loss
    prior: Prior
    schedule: Schedule
    render: RenderSettings
    score: Score
    captioner: dict[str, Any]  # settings
    refiner: dict[str, Any]  # settings
    memory: Memory
    tracker: Tracker
    files: TrainingFiles
    images: TrainingImages
    adapter: PeftConfig
    make_optimizer: MakeOptimizer
    optimizer_name: str
    traits: OptimizerTraits  # of the optimizer
    start_lora: Path | None  # whose weights the adapter starts from
    device: torch.device
    dtype: torch.dtype  # of the frozen base
    size: TrainingSize
    start_time: float  # time.perf_counter() when it began to be resolved
    resumed: bool  # whether the run folder has an earlier part of this run
    resume_from: Path | None  # a checkpoint
    fingerprint: dict[str, object]  # settings and file hashes that a resumed run must share
    hashes: dict[str, str]
    snapshot_key: str | None  # trainings of one key and one start differ in `steps` alone: see group_snapshots
    record: dict[str, Any]  # the whole configuration as plain data, for trackers

    def is_due(self, every: int, step: int) -> bool:
        """Whether what happens `every` so many steps (0: never) happens after `step`; the end has its own turn."""
        return every > 0 and step % every == 0 and step < self.steps


def resolve_training(config: Config, folder: Path, reuse_from: ResolvedTraining | None = None) -> ResolvedTraining:
    """Read and check everything that can be wrong: dataset, base, libraries, checkpoint. Raises InputError.

    `reuse_from` is a training of the same base and the same images, which are not read again then."""
    start_time = time.perf_counter()
    refuse_missing(folder, config.resume)
    base = locate_model("model.base", config.model.base)
    validate_prediction(config.model, config.loss)
    device = pick_device(config.device)
    # peft takes an empty dict for no patterns, to which Hydra would let nobody add keys.
    adapter = call_target("adapter", {k: {} if v is None else v for k, v in config.adapter.items()})
    settings = config.stage
    start_lora = None
    if settings.start_from:
        start_lora = resolve_lora(settings.start_from, [], layer_shapes(config.model), "stage.start_from")
    inject.validate_adapter(adapter, config.adapter, settings.lora_plus_ratio, start_lora)
    traits, make_optimizer = resolve_optimizer(config.optimizer, device)
    optimizer_name = config.optimizer["_target_"].rpartition(".")[2]
    if config.text.learns or start_lora:
        validate_text(config.text, adapter, optimizer_name, traits, start_lora)
    if settings.ema_decay and traits.averages_weights:
        raise InputError("stage.ema_decay: the optimizer saves an average of its own, use stage.ema_decay=0")
    validate_quantization(config.memory.linear_weights, config.memory.convolution_weights, device)
    dtype = pick_dtype(config.model.precision, device)
    files = reuse_from.files if reuse_from else _read_files(config, folder, base, dtype)
    hashes = files.hashes
    if start_lora:
        embeddings = [embeddings_path(start_lora)] if read_tokens(start_lora) else []
        hashes = hashes | {"start": hash_files(start_lora, *embeddings)}
    # The validation loss is measured and decides nothing.
    fingerprint = training_fingerprint(config) | {name: value for name, value in hashes.items() if name != "validation"}
    resume_from = _newest_checkpoint(config.resume, folder, config.steps)
    if resume_from:
        validate_fingerprint(resume_from, fingerprint)
    return ResolvedTraining(
        **{key: getattr(config, key) for key in COPIED},
        folder=folder,
        lr=config.rate,
        requested_lr=config.lr,
        install=config.publish is not False,
        cache=None if config.cache is None else Path(config.cache),
        settings=settings,
        render=_render(config, hashes["base"], dtype),
        files=files,
        images=reuse_from.images if reuse_from else _open_images(config, files),
        adapter=adapter,
        make_optimizer=make_optimizer,
        optimizer_name=optimizer_name,
        traits=traits,
        start_lora=start_lora,
        device=device,
        dtype=dtype,
        size=training_size(config, traits),
        start_time=start_time,
        resumed=bool(config.resume),
        resume_from=resume_from,
        fingerprint=fingerprint,
        hashes=hashes,
        snapshot_key=snapshot_key(config),
        record=asdict(config),
    )


def resolve_run(config: Config, folder: Path, reuse_from: ResolvedTraining | None = None) -> ResolvedTraining:
    """`resolve_training` for a run that starts or resumes in `folder`, where manifest.json records with what.

    Raises InputError for a folder that has another run."""
    if not config.resume:
        refuse_used(folder, METRICS)
    training = resolve_training(config, folder, reuse_from)
    named = zip(training.files.samples, training.files.texts, strict=True)
    captions = {sample.name: [orders[0] for orders in texts] for sample, texts in named}
    prompts = (training.settings.prompts, training.score, training.prior)
    for line in text_warnings(captions, *prompts, training.model, training.text, training.triggers):
        say_once(line)
    write_manifest(folder, training.device, training.hashes)
    return training


def resolve_optimizer(settings: dict[str, Any], device: torch.device) -> tuple[OptimizerTraits, MakeOptimizer]:
    """The optimizer's traits, and its constructor with its arguments, those that depend on the device decided.

    Raises InputError."""
    traits, arguments = OptimizerTraits.split(settings)
    if arguments.get("fused", False) is None:
        arguments["fused"] = device.type == "cuda"
    call_target("optimizer", arguments, [_probe()])  # a wrong argument is found before work begins
    return traits, bind_target("optimizer", arguments, leading=1)


def training_size(config: Config, traits: OptimizerTraits) -> TrainingSize:
    """What decides the memory of the training that `config` describes, with an optimizer of these `traits`."""
    return TrainingSize(
        profile=base_class(config.model).memory,
        memory=config.memory,
        rank=config.rank,
        batch_size=config.batch_size,
        resolution=config.model.resolution,
        trains_text=config.text.learns,
        keeps_average=bool(config.stage.ema_decay),
        optimizer_state_bytes=traits.state_bytes,
    )


def snapshot_key(config: Config) -> str | None:
    """Equal for trainings that differ in `steps` alone, and in where they start; None where the schedule depends on
    `steps`."""
    schedule = config.schedule
    if schedule.name not in ("constant", "constant_with_warmup") or 0 < schedule.warmup < 1:
        return None
    return repr(asdict(config) | {"steps": 0, "name": "", "publish": None, "tracker": None, "resume": None})


def group_snapshots(keys: Sequence[str | None], starts: Sequence[Path | None], steps: Sequence[int]) -> list[list[int]]:
    """The indices of trainings by `snapshot_key` and the name of the checkpoint that they start from: of each group the
    longest training first, then its snapshots."""
    groups: dict[object, list[int]] = {}
    for i, (key, start) in enumerate(zip(keys, starts, strict=True)):
        groups.setdefault(i if key is None else (key, start and start.name), []).append(i)
    return [sorted(indices, key=lambda i: -steps[i]) for indices in groups.values()]


def _probe() -> torch.nn.Parameter:
    """A parameter of one number, on which an optimizer is tried."""
    return torch.nn.Parameter(torch.zeros(1))


def _render(config: Config, base: str, dtype: torch.dtype) -> RenderSettings:
    """How the run renders; `base` is the hash of the base's files."""
    return render_settings(
        config.model, config.loss, config.memory, config.sampler, config.text, config.cache, base, dtype
    )


def _read_files(config: Config, folder: Path, base: str, dtype: torch.dtype) -> TrainingFiles:
    dataset, masks = config.dataset, find_masks(config.loss.mask)
    folders = [(locate_folder("dataset.root", f.root), f.repeats) for f in dataset.folders]
    samples = read_folders(folders, dataset.follow_links, dataset.kohya_folders)
    triggers = config.triggers
    texts = [caption_texts(sample.captions, dataset, triggers.of(sample.name)) for sample in samples]
    require_trigger({sample.name: chain(*own) for sample, own in zip(samples, texts, strict=True)}, triggers)
    hashes = {
        "base": hash_model(base),
        "dataset": hash_files(*(s.path for s in samples)),
        "captions": hash_text("\n".join("\t".join([s.name, *s.captions]) for s in samples)),
    }
    if config.loss.masks == "folder":
        hashes["masks"] = hash_files(*(masks.file(s.name) for s in samples))
    render = _render(config, hashes["base"], dtype)
    prior_samples = []
    if config.prior.kind != "none":
        prior_samples = class_samples(config.prior, triggers, samples, render, folder)
    if prior_samples:
        hashes["prior"] = hash_of(prior_samples, config.prior)
    held_out = []
    if config.stage.validation_root:
        held_out = read_dataset(locate_folder("stage.validation_root", config.stage.validation_root))
        triggers.names_by_trigger(sample.name for sample in held_out)
        hashes["validation"] = hash_files(*(s.path for s in held_out))
    if config.model.judge is not None:
        validate_embedders(config.model, config.score, config.captioner)
    track.validate(config.tracker)
    if config.cache is not None:
        refuse_unwritable(Path(config.cache), "name another with cache=, or use cache=null")
    return TrainingFiles(samples, texts, held_out, prior_samples, hashes)


def _open_images(config: Config, files: TrainingFiles) -> TrainingImages:
    dataset, masks = config.dataset, find_masks(config.loss.mask)
    resolution, bucket_step = config.model.resolution, config.model.bucket_step
    fitted = fit_pictures(files.samples, resolution, bucket_step, masks)
    held_out = fit_pictures(files.held_out, resolution, bucket_step, None)
    on_disk = [sample for sample in files.class_samples if sample.path.is_file()]
    references = {}
    if config.model.judge is not None:
        references = held_out_pictures(config.model, config.score, config.triggers)
    return TrainingImages(
        fitted=fitted,
        crops=crop_pictures(files.samples, fitted, masks, dataset.crops if dataset.random_crop else 1),
        held_out=held_out,
        references=references or pictures_by_trigger(config.triggers, files.held_out, held_out),
        class_images=fit_pictures(on_disk, resolution, bucket_step, None),
    )


def pictures_by_trigger(triggers: Triggers, samples: Sequence[Sample], fitted: Sequence[Fitted]) -> Pictures:
    """The images of each character, by its trigger; {} without any."""
    found: dict[str, list[Image.Image]] = {}
    for sample, image in zip(samples, fitted, strict=True):
        found.setdefault(triggers.of(sample.name), []).append(image.picture)
    return found


def _newest_checkpoint(resume: str | None, folder: Path, steps: int) -> Path | None:
    if not resume:
        return None
    newest = newest_checkpoint(folder)
    if newest is None:
        say(f"{display_path(folder)} has no checkpoint yet: the training starts from its beginning")
    elif step_of(newest) > steps:
        raise InputError(f"resume={resume}: {newest.name} is beyond steps={steps}, set more steps")
    return newest
