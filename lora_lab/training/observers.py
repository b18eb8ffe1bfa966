"""What watches a run between its steps: checkpoints and LoRA files, validation loss, validation images, scores."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from lora_lab.adapters.files import (
    MODELS,
    TRIGGER,
    embeddings_path,
    keep_older,
    kohya_state,
    metadata,
    network_metadata,
    same_tensors,
    save_lora,
    save_tokens,
)
from lora_lab.base.encode import Encoder
from lora_lab.base.load import DTYPES, base_class
from lora_lab.console import say
from lora_lab.errors import RunError
from lora_lab.evaluation.scores import ScoredImages, numbers, rows, table, write_lines
from lora_lab.runs import display_path, remove_temporary_files, write_atomically
from lora_lab.sampling.generate import ImageSpec, image_specs, render_base, render_with_lora, save_image
from lora_lab.track.base import Track
from lora_lab.training.base_context import BaseContext
from lora_lab.training.data import Example, TrainingData
from lora_lab.training.lora_training import LoRATraining, remove_older, save_checkpoint
from lora_lab.training.loss import Batch, per_sample_loss
from lora_lab.training.metrics import MetricsFile
from lora_lab.training.randomness import generator
from lora_lab.training.resolve import ResolvedTraining
from lora_lab.training.text_encoders import text_metadata


class Observer:
    """Hooks of a run; each does nothing unless an observer defines it. `step` is the number of steps done.

    All numbers of a step have arrived and are finite before `on_step` and `on_end` are called for work that is due."""

    def on_start(self, step: int) -> None:
        """The run starts, or resumes after `step` steps."""

    def on_step(self, step: int) -> None:
        """A step is done, and it is not the last one."""

    def on_end(self, step: int) -> None:
        """The last step is done."""


@dataclass
class RunArtifacts(Observer):
    """Writes the finished LoRA, and checkpoints when it is told to; removes those that are not kept.

    The checkpoints of runs that share their steps are written before the observers of any of them work."""

    resolved: ResolvedTraining
    training: LoRATraining
    lora: Path | None = None  # the finished file
    installed: Path | None = None  # its copy in models/lora

    def on_step(self, step: int) -> None:
        """Remove older checkpoints, if one was written after this step."""
        if self.resolved.is_due(self.resolved.settings.checkpoint_every, step):
            self._remove_older(step)

    def on_end(self, step: int) -> None:
        """Remove older checkpoints and write the finished LoRA."""
        self._remove_older(step)
        self.lora = self.save_lora(step, self.resolved.name)

    def install(self) -> None:
        """Copy the finished LoRA to models/lora, if it shall be there."""
        if self.resolved.install:
            self.installed = install_lora(self.lora, self.resolved.name)

    def save_checkpoint(self, step: int) -> None:
        """Write checkpoints/step-NNNNNN."""
        save_checkpoint(self.resolved.folder, step, self.training, self.resolved.fingerprint)

    def _remove_older(self, step: int) -> None:
        remove_older(self.resolved.folder, step, self.resolved.settings.keep_checkpoints)

    def lora_file(self, name: str) -> Path:
        """Where a LoRA of that name is written."""
        return self.resolved.folder / "lora" / f"{name}.safetensors"

    def save_lora(self, step: int, name: str) -> Path:
        """Write the LoRA after `step` steps as lora/`name`.safetensors, and new tokens' embeddings beside it.

        Raises RunError for values that are not finite, or too large for stage.save_dtype; DiskFullError."""
        resolved, training = self.resolved, self.training
        file = self.lora_file(name)
        with training.swap_in_saved_weights():  # until the file is written: on a CPU the weights are views
            weights = training.weights()
            state = kohya_state(training.adapted_components, base_class(resolved.model).lora_key, values=weights)
            self._refuse_overflow(state, step)
            network = network_metadata(resolved.adapter, state, resolved.settings.lora_plus_ratio)
            if training.text_encoders:
                network |= text_metadata(resolved.text, resolved.lr)
            if training.text_encoders and (tokens := training.text_encoders.tokens):
                by_parameter = dict(zip(training.params.params, weights.values(), strict=True))
                vectors = {key: by_parameter[new.vectors] for key, new in tokens.items()}
                notes = {"modelspec.title": name, TRIGGER: resolved.triggers.phrase}
                save_tokens(embeddings_path(file), vectors, notes)
            return save_lora(
                file,
                state,
                DTYPES[resolved.settings.save_dtype],
                lora_metadata(resolved, training, step, network),
            )

    def _refuse_overflow(self, state: dict[str, Tensor], step: int) -> None:
        """Raise RunError, with a checkpoint written, where a tensor of the file would be infinite or NaN."""
        resolved, save_dtype = self.resolved, self.resolved.settings.save_dtype
        wrong = [key for key, value in state.items() if not value.to(DTYPES[save_dtype]).isfinite().all()]
        if not wrong:
            return
        self.save_checkpoint(step)  # refuses what is not finite in float32 either
        largest = max(state[key].abs().max().item() for key in wrong)
        raise RunError(
            f"the LoRA after step {step} is too large for stage.save_dtype={save_dtype} ({largest:.1e} in {wrong[0]}): "
            f"use a lower lr, or save its checkpoint with resume={display_path(resolved.folder)} "
            "stage.save_dtype=bf16"
        )


def lora_metadata(
    resolved: ResolvedTraining, training: LoRATraining, step: int, network: dict[str, str]
) -> dict[str, str]:
    """The metadata of the LoRA file after `step` steps; `network` describes the adapter."""
    prior, named = {}, zip(resolved.files.samples, resolved.files.texts, strict=True)
    captions = {sample.name: ", ".join(orders[0] for orders in texts) for sample, texts in named}
    if resolved.prior.kind != "none":
        prior["ss_prior_loss_weight"] = str(resolved.prior.weight)
        prior["ss_num_reg_images"] = str(len(resolved.files.class_samples))
    return prior | metadata(
        name=resolved.name,
        base=resolved.model.base,
        triggers=resolved.triggers,
        network=network,
        lr=resolved.lr,
        steps=step,
        batch_size=resolved.batch_size,
        seed=resolved.seed,
        resolution=resolved.model.resolution,
        captions=captions,
        text=resolved.text,
        loss=training.objective.settings,
        prediction=training.objective.schedule.prediction,
        kind_of_base=base_class(resolved.model).lora_metadata,
        dataset_hash=resolved.hashes["dataset"],
        base_hash=resolved.hashes["base"],
    )


def install_lora(lora: Path, name: str) -> Path:
    """Copy a finished file to models/lora/`name`.safetensors, and the embeddings beside it; a different file of that
    name is kept under a number."""
    MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(MODELS.with_name(".lora.lock")):  # two runs that finish at once would take the same number
        remove_temporary_files(MODELS)
        return _install_lora(lora, MODELS / f"{name}.safetensors")


def _install_lora(lora: Path, target: Path) -> Path:
    copies = {lora: target}
    if embeddings_path(lora).is_file():
        copies[embeddings_path(lora)] = embeddings_path(target)
    if all(copy.is_file() and same_tensors(copy, file) for file, copy in copies.items()):
        return target  # a finished run was resumed
    older = keep_older(target)
    if older:
        say(f"{target} was there already; it is now {older}")
        if embeddings_path(target).is_file():
            embeddings_path(target).rename(embeddings_path(older))
    elif len(copies) > 1:
        keep_older(embeddings_path(target))  # its LoRA is gone
    for file, copy in reversed(copies.items()):
        write_atomically(copy, partial(shutil.copyfile, file))
    return target


@dataclass
class ValidationLoss(Observer):
    """Measures the validation loss at the start, every stage.validation_loss_every steps, and at the end."""

    training: LoRATraining
    data: TrainingData
    file: MetricsFile
    tracker: Track

    def on_start(self, step: int) -> None:
        """Measure the base, or what was due at `step` when the run stopped."""
        if step == 0 or step % self.training.settings.validation_loss_every == 0:
            self._measure(step)

    def on_step(self, step: int) -> None:
        """Measure where that is due."""
        if step % self.training.settings.validation_loss_every == 0:
            self._measure(step)

    def on_end(self, step: int) -> None:
        """Measure the finished LoRA."""
        self._measure(step)

    def _measure(self, step: int) -> None:
        if step in self.file.steps:
            return
        loss = validation_loss(self.training, self.data, self.training.settings.validation_timesteps)
        self.file.write(step, {"loss": loss})
        self.tracker.numbers(step, {"validation/loss": loss})


@torch.no_grad()
def validation_loss(training: LoRATraining, data: TrainingData, timesteps: Sequence[int]) -> float:
    """The mean squared error of the prediction over all images of `data` at all `timesteps`, equally weighted.

    It is measured with the weights that would be saved, without dropout, flips and masks, and changes nothing in the
    training. The noise depends on image and timestep alone, so runs of another seed or loss are measured alike."""
    squared = replace(training.objective, settings=replace(training.objective.settings, type="l2"))
    total = torch.zeros((), device=training.params.master.device)
    training.train(False)
    # Eagerly: compiled blocks would be compiled again for evaluation mode.
    with training.swap_in_saved_weights(), torch.compiler.set_stance("force_eager"):
        for example in data.examples:
            for start in range(0, len(timesteps), training.batch_size):
                batch = _batch(example, timesteps[start : start + training.batch_size])
                if training.text_encoders is not None:
                    batch = training.text_encoders(batch)
                total += per_sample_loss(training.network, squared, batch).sum()
    return total.item() / (len(data.examples) * len(timesteps))


def _batch(example: Example, timesteps: Sequence[int]) -> Batch:
    """The first view and caption of one image at each of B `timesteps`."""
    view, text, count = example.crops[0][0], example.texts[0][0], len(timesteps)
    latents = view.latents
    noise = [torch.randn(latents.shape, generator=generator("validation", example.name, t)) for t in timesteps]
    ones = torch.ones(count, device=latents.device)
    return Batch(
        latents=latents.expand(count, *latents.shape),
        noise=torch.stack(noise).to(latents.device),
        timesteps=torch.tensor(timesteps, device=latents.device),
        conditioning={name: v.expand(count, *v.shape) for name, v in (text | view.conditioning).items()},
        loss_weights=ones,
        huber_delta=ones,  # squares do not use it
    )


@dataclass
class ValidationImages(Observer):
    """Renders the stage's prompts: by the base at the start, with the LoRA every stage.validate_every steps and at the
    end."""

    resolved: ResolvedTraining
    artifacts: RunArtifacts
    encoder: Encoder
    tracker: Track

    @property
    def specs(self) -> list[ImageSpec]:
        """Every prompt, for each character that it may show, with every seed."""
        settings = self.resolved.settings
        return image_specs(self.resolved.triggers.fill(settings.prompts), settings.seeds)

    @property
    def folder(self) -> Path:
        """The folder of all validation images."""
        return self.resolved.folder / "samples"

    def on_start(self, step: int) -> None:
        """Render by the base; in a resumed run also the images that were due at `step` and are missing."""
        specs = self.specs
        images, _ = render_base(specs, self.resolved.render, self.resolved.folder, self.encoder)
        for spec, image in zip(specs, images, strict=True):
            save_image(self.folder / "base" / f"{spec.name}.png", image, spec, "none")
        images = [self._folder_of(step) / f"{spec.name}.png" for spec in specs]
        if step and not all(file.is_file() for file in (self.artifacts.lora_file(self._name_of(step)), *images)):
            self.on_step(step)

    def on_step(self, step: int) -> None:
        """If images are due at `step`, write a file of the LoRA as it is now, and render with it."""
        if self.resolved.is_due(self.resolved.settings.validate_every, step):
            self._render(self.artifacts.save_lora(step, self._name_of(step)), step)

    def on_end(self, step: int) -> None:
        """Render with the finished LoRA."""
        self._render(self.artifacts.lora, step)

    def files(self) -> dict[str, list[str]]:
        """The files of all validation images by step, those from before a resume included."""
        folders = sorted(self.folder.glob("step-*"))
        return {str(int(f.name.removeprefix("step-"))): sorted(map(str, f.glob("[!.]*.png"))) for f in folders}

    def _name_of(self, step: int) -> str:
        return f"{self.resolved.name}-{step:06d}"

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _render(self, lora: Path, step: int) -> None:
        specs = self.specs
        images = render_with_lora(lora, specs, self._folder_of(step), self.resolved.render, self.encoder)
        run = f"rank {self.resolved.rank}, lr {self.resolved.lr:g}, step {step}"
        captioned: dict[str, tuple[Image.Image, str]] = {
            f"validation/{spec.name}": (image, f"{spec.prompt} | {run}, seed {spec.seed}")
            for spec, image in zip(specs, images, strict=True)
        }
        self.tracker.images(step, captioned)


@dataclass
class FinalScores(Observer):
    """Scores the finished LoRA by what it renders."""

    resolved: ResolvedTraining
    artifacts: RunArtifacts
    context: BaseContext
    tracker: Track
    scored: ScoredImages | None = None

    def on_end(self, step: int) -> None:
        """Render and score; write scores.jsonl and the tracker's table."""
        resolved, context = self.resolved, self.context
        if context.base_scores is None:
            return
        folder = resolved.folder / "samples" / "score"
        self.scored = context.scorers.score(self.artifacts.lora, resolved.render, folder, context.encoder)
        write_lines(resolved.folder, [context.base_scores, self.scored])
        say(table([context.base_scores, self.scored]))
        self.tracker.numbers(step, numbers(self.scored.scores))
        self.tracker.table(step, rows(self.scored, resolved.rank, resolved.lr, step))
