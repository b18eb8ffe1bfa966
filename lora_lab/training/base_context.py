"""The base model with everything that trainings of one dataset share on it: encoded data, prior, scores of the base."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from lora_lab.adapters.tokens import tokenizers_of
from lora_lab.base.encode import Cache, Encoder
from lora_lab.base.layers import quantize_
from lora_lab.base.load import load_base
from lora_lab.evaluation.scores import ScoredImages, Scorers
from lora_lab.training.data import TrainingData, caption_texts, encode_dataset
from lora_lab.training.engine import StepBatches
from lora_lab.training.lora_training import LoRATraining
from lora_lab.training.loss import Batch
from lora_lab.training.prior import PriorData, prior_data
from lora_lab.training.randomness import seed_of
from lora_lab.training.resolve import ResolvedTraining, pictures_by_trigger


@dataclass(frozen=True)
class BaseContext:
    """What trainings of one dataset on one base share."""

    encoder: Encoder
    data: TrainingData
    prior: PriorData | None
    validation_data: TrainingData
    scorers: Scorers | None
    base_scores: ScoredImages | None  # of the base alone, without its images; None without model.judge

    def batches(self, training: LoRATraining, step: int) -> StepBatches:
        """What `training` computes its gradient from after `step` steps: a function of its seed and the step."""
        settings = training.settings

        def accumulated(batch: Callable[..., Batch], **options: float) -> list[Batch]:
            parts = settings.gradient_accumulation
            return [
                batch(
                    seed=training.seed,
                    step=step,
                    part=part,
                    parts=parts,
                    batch_size=training.batch_size,
                    objective=training.objective,
                    **options,
                )
                for part in range(parts)
            ]

        character = accumulated(self.data.batch, caption_dropout=settings.caption_dropout)
        prior = accumulated(self.prior.batch) if self.prior else []
        return StepBatches(character, prior, seed_of(training.seed, "dropout", step))

    def image_names(self, training: LoRATraining, loss: str, step: int) -> list[str]:
        """The images whose `loss` (loss or prior_loss) `training` computed after `step` steps."""
        source = self.prior if loss == "prior_loss" else self.data
        parts = training.settings.gradient_accumulation
        return source.names(seed=training.seed, step=step, parts=parts, batch_size=training.batch_size)


def prepare_base(training: ResolvedTraining) -> BaseContext:
    """Load the base, encode images and captions, render class images that are missing, score the base; then free the
    images of `training`.

    Embedders are loaded first: one that cannot be loaded costs seconds then, not a training. Raises InputError."""
    free_gpu_memory(training.device)
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of an earlier training in this process
    images, files = training.images, training.files
    scorers = _load_scorers(training) if training.model.judge else None
    # Modules are moved to the GPU one at a time; the network stays there.
    base = load_base(training.model, training.device, waiting=True)
    if training.memory.vae_tiling:
        base.enable_tiling(training.model.resolution // 2)
    base.apply_loss(training.loss)
    base.text_window = training.text.window
    tokenizers = tokenizers_of(base, training.triggers.phrase, training.text.tokens) if training.text.learns else None
    encoder = Encoder(base, training.device, Cache(training.cache), True, tokenizers)
    data = encode_dataset(files.samples, images.crops, files.texts, training.dataset.flip, encoder)
    validation_data = _held_out_data(training, encoder) if files.held_out else data
    quantize_(base.network, training.memory.linear_weights, training.memory.convolution_weights, training.device)
    prior = _prior(training, data, encoder) if training.prior.kind != "none" else None
    if training.text.learns:  # a text's embedding changes with every step from now on
        encoder = replace(encoder, tokenizers=None, cache=Cache(None))
    base_scores = scorers and replace(scorers.score_base(training.render, training.folder, encoder), pictures=[])
    images.free()
    return BaseContext(encoder, data, prior, validation_data, scorers, base_scores)


def _load_scorers(training: ResolvedTraining) -> Scorers:
    """Scores LoRAs by held-out images, or by the training images where none are held out. Raises InputError."""
    return Scorers.load(
        training.score,
        training.model,
        training.captioner,
        training.refiner,
        training.class_noun,
        pictures_by_trigger(training.triggers, training.files.samples, training.images.fitted),
        training.images.references,
        training.device,
    )


def _prior(training: ResolvedTraining, data: TrainingData, encoder: Encoder) -> PriorData:
    """What preserves the prior, for `data` of the character. Raises RunError for non-finite values."""
    return prior_data(
        training.prior,
        training.triggers,
        data,
        training.files.texts,
        training.files.class_samples,
        training.images.class_images,
        training.model,
        training.render,
        encoder,
    )


def _held_out_data(training: ResolvedTraining, encoder: Encoder) -> TrainingData:
    """The held-out images with the first caption of each, cut at the centre and not mirrored."""
    held_out, triggers = training.files.held_out, training.triggers
    crops = [[fitted] for fitted in training.images.held_out]
    texts = [caption_texts(sample.captions[:1], training.dataset, triggers.of(sample.name)) for sample in held_out]
    return encode_dataset(held_out, crops, texts, False, encoder)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Within the context the garbage collector is off.

    Building a network makes a hundred thousand objects; scanning all of them every few hundred takes a third of the
    time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def free_gpu_memory(device: torch.device) -> None:
    """Free what earlier trainings in this process held: networks and their hooks refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
