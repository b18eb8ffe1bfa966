"""The plan of a training as a person reads it before it starts."""

from collections.abc import Mapping

import torch

from lora_lab.adapters.files import MODELS
from lora_lab.training.data import count_buckets
from lora_lab.training.memory import describe_memory
from lora_lab.training.randomness import batches_per_epoch
from lora_lab.training.resolve import ResolvedTraining
from lora_lab.training.text_encoders import describe_text

SHARED_LINES = ("character", "sizes", "base", "memory")  # that the trainings of a pack have in common


def describe(training: ResolvedTraining) -> str:
    """One line for each part of the plan, its name in front."""
    lines = _base_lines(training) | _option_lines(training)
    return "\n".join(f"{name:>10}  {text}" for name, text in lines.items())


def describe_pack(trainings: Mapping[str, ResolvedTraining]) -> str:
    """The plan of trainings that share every step, by the names of their jobs."""
    first = next(iter(trainings.values()))
    shared = [line for line in describe(first).splitlines() if line.split()[0] in SHARED_LINES]
    jobs = [f"#{name} rank {t.rank}, lr {t.lr:g}, {t.steps} steps" for name, t in trainings.items()]
    pack = f"\n{'':>12}".join([f"{len(jobs)} jobs on one base", *jobs])
    return "\n".join([*shared, f"{'together':>10}  {pack}"])


def _base_lines(training: ResolvedTraining) -> dict[str, str]:
    settings, samples = training.settings, training.files.samples
    per_epoch: dict[tuple[int, int], int] = {}  # images of an epoch by size
    for sample, fitted in zip(samples, training.images.fitted, strict=True):
        per_epoch[fitted.picture.size] = per_epoch.get(fitted.picture.size, 0) + sample.repeats
    batches = batches_per_epoch([[0] * count for count in per_epoch.values()], training.batch_size)
    epochs = training.steps * settings.gradient_accumulation / batches
    folders = ", ".join(
        f"{f.root}" + (f" ({f.repeats} times)" if f.repeats > 1 else "") for f in training.dataset.folders
    )
    sizes = count_buckets(training.images.fitted)
    images = len(settings.prompts) * len(settings.seeds)
    interval = f"every {settings.validate_every} steps and " if settings.validate_every else ""
    dtype = str(training.dtype).removeprefix("torch.")
    installed = f", and the LoRA also to {MODELS / training.name}.safetensors" if training.install else ""
    return {
        "character": f"{training.trigger}, {len(samples)} images in {folders}",
        "sizes": ", ".join(f"{count} of {width}x{height}" for (width, height), count in sizes.items()),
        "base": f"{training.model.base} on {training.device} in {dtype}",
        "training": f"{training.steps} steps of {training.batch_size * settings.gradient_accumulation} "
        f"({epochs:.1f} epochs), rank {training.rank}, lr {training.lr:g}",
        "validation": f"{images} images {interval}at the end",
        "writes": f"{training.folder}{installed}",
    }


def _option_lines(training: ResolvedTraining) -> dict[str, str]:
    """The lines of what is not the default, each only where it applies."""
    settings, loss, images = training.settings, training.loss, training.images
    orders = {order for captions in training.files.texts for variants in captions for order in variants}
    lines = {
        "starts": training.start_lora and f"from {training.start_lora}",
        "prior": training.prior.kind != "none" and _describe_prior(training),
        "masks": loss.mask != "none" and f"{loss.mask}; the loss outside the mask has weight {loss.unmasked_weight:g}",
        "its loss": settings.validation_loss_every and _describe_validation_loss(training),
        "saved": settings.ema_decay and f"a moving average of the weights with decay {settings.ema_decay:g}",
        "optimizer": _describe_lr(training),
        "memory": training.device.type == "cuda" and _describe_memory(training),
        "crops": training.dataset.random_crop and f"{sum(map(len, images.crops))} of {len(images.fitted)} images",
        "captions": training.dataset.shuffle_captions and f"{len(orders)} orders",
        "text": training.text.learns and describe_text(training.text, training.trigger, training.lr, training.steps),
        "resumes": training.resume_from and f"from {training.resume_from}",
    }
    return {name: line for name, line in lines.items() if line}


def _describe_lr(training: ResolvedTraining) -> str | None:
    if training.lr == training.requested_lr:
        return None
    return f"{training.optimizer_name} with its own lr, {training.lr:g}; lr={training.requested_lr:g} is not used"


def _describe_memory(training: ResolvedTraining) -> str:
    return describe_memory(training.size, torch.cuda.mem_get_info(training.device)[0] / 2**20)


def _describe_validation_loss(training: ResolvedTraining) -> str:
    images = f"{len(training.files.held_out)} images in {training.settings.validation_root}"
    if not training.files.held_out:
        images = "the training images, which can be memorised (stage.validation_root names others)"
    return f"at the start, every {training.settings.validation_loss_every} steps and at the end, on {images}"


def _describe_prior(training: ResolvedTraining) -> str:
    prior, count = training.prior, len(training.files.class_samples)
    prompt = f" of {prior.prompt!r}" if prior.prompt else ""
    if prior.kind == "prediction":
        source = f"the base's prediction for captions with {prior.class_noun} instead of {training.trigger}"
    elif prior.kind == "pictures":
        source = f"{count} class images{prompt} in {prior.root}"
    else:
        missing = count - len(training.images.class_images)
        source = f"{count} class images{prompt}, {missing} of them still to be rendered"
    return f"{source}; its loss has weight {prior.weight:g}"
