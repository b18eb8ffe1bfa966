"""One run: its plan as a person reads it, its observers, and its result."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_lab.adapters.files import MODELS
from lora_lab.base.load import DTYPES
from lora_lab.base.locate import locate_folder
from lora_lab.console import say
from lora_lab.errors import DiskFullError, InputError, RunError
from lora_lab.evaluation.metrics import Scores
from lora_lab.images.dataset import cut_away_line, frames_line, unused_line
from lora_lab.runs import display_path, free_space, remove_temporary_files, resume_command
from lora_lab.track import tracking
from lora_lab.training.base_context import BaseContext
from lora_lab.training.data import count_buckets
from lora_lab.training.engine import Losses
from lora_lab.training.lora_training import LoRATraining, Update, checkpoints, remove_incomplete
from lora_lab.training.memory import describe_memory
from lora_lab.training.metrics import StepMetrics, last_validation_loss, mean_loss, metrics_files
from lora_lab.training.observers import FinalScores, Observer, RunArtifacts, ValidationImages, ValidationLoss
from lora_lab.training.randomness import batches_per_epoch
from lora_lab.training.resolve import ResolvedTraining
from lora_lab.training.text_encoders import describe_text

PNG_BYTES = 2  # of a pixel, about: a drawing takes less, a photo more
# Lines that the trainings of a pack have in common.
SHARED_LINES = ("character", "unused", "frames", "sizes", "cut", "base", "memory")


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
    images = len(training.triggers.fill(settings.prompts)) * len(settings.seeds)
    interval = f"every {settings.validate_every} steps and " if settings.validate_every else ""
    dtype = str(training.dtype).removeprefix("torch.")
    installed = f", and the LoRA also to {MODELS / training.name}.safetensors" if training.install else ""
    return {
        "character": f"{training.triggers.phrase}, {len(samples)} images in {folders}",
        "sizes": ", ".join(f"{count} of {width}x{height}" for (width, height), count in sizes.items()),
        "base": f"{training.model.base} on {training.device} in {dtype}",
        "training": f"{training.steps} steps of {training.batch_size * settings.gradient_accumulation} "
        f"({epochs:.1f} epochs), rank {training.rank}, lr {training.lr:g}",
        "validation": f"{images} images {interval}at the end",
        "writes": f"{display_path(training.folder)}{installed}",
    }


def _option_lines(training: ResolvedTraining) -> dict[str, str]:
    """The lines of what is not the default, each only where it applies."""
    settings, loss, images = training.settings, training.loss, training.images
    orders = {order for captions in training.files.texts for variants in captions for order in variants}
    cuts = {s.name: f for s, f in zip(training.files.samples, images.fitted, strict=True)}
    lines = {
        "unused": _describe_unused(training),
        "frames": frames_line({sample.name: sample.path for sample in training.files.samples}),
        "cut": not training.dataset.random_crop and cut_away_line(cuts),
        "starts": training.start_lora and f"from {training.start_lora}",
        "prior": training.prior.kind != "none" and _describe_prior(training),
        "masks": loss.mask != "none" and f"{loss.mask}; the loss outside the mask has weight {loss.unmasked_weight:g}",
        "its loss": settings.validation_loss_every and _describe_validation_loss(training),
        "saved": settings.ema_decay and f"a moving average of the weights with decay {settings.ema_decay:g}",
        "optimizer": _describe_lr(training),
        "memory": training.device.type == "cuda" and _describe_memory(training),
        "crops": training.dataset.random_crop and f"{sum(map(len, images.crops))} of {len(images.fitted)} images",
        "captions": training.dataset.shuffle_captions and f"{len(orders)} orders",
        "text": training.text.learns
        and describe_text(training.text, training.triggers.phrase, training.lr, training.steps),
        "resumes": training.resume_from and f"from {display_path(training.resume_from)}",
    }
    return {name: line for name, line in lines.items() if line}


def _describe_unused(training: ResolvedTraining) -> str:
    """The files in the folders of images that are not used; "" if there are none."""
    dataset = training.dataset
    roots = [locate_folder("dataset.root", folder.root) for folder in dataset.folders]
    others = [Path(root) for root in (training.prior.root, training.settings.validation_root) if root]
    lines = [unused_line(roots, dataset.follow_links), *(unused_line([root]) for root in others)]
    return "; ".join(filter(None, lines))


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
        source = f"the base's prediction for captions with {prior.class_noun} instead of {training.triggers.phrase}"
    elif prior.kind == "pictures":
        source = f"{count} class images{prompt} in {prior.root}"
    else:
        missing = count - len(training.images.class_images)
        source = f"{count} class images{prompt}, {missing} of them still to be rendered"
    return f"{source}; its loss has weight {prior.weight:g}"


@dataclass(frozen=True)
class TrainResult:
    """result.json of a training."""

    stage: str
    name: str
    trigger: str  # of several characters all of them
    lora: str  # the finished file, in the run folder
    model: str | None  # its copy in models/lora, if there is one
    steps: int
    seconds: float  # wall time since the run started, loading and rendering included
    loss: float  # mean of the last 50 steps
    validation_loss: float | None  # of the finished LoRA; None without stage.validation_loss_every
    scores_before: Scores | None  # of the base without the LoRA; None without model.judge
    scores: Scores | None  # docs/scores.md
    samples: dict[str, list[str]]  # step to its validation images


@dataclass
class TrainingRun:
    """One run of a training up to `resolved.steps`. Several runs may follow one training, each to its own last step."""

    resolved: ResolvedTraining
    training: LoRATraining
    metrics: StepMetrics
    artifacts: RunArtifacts
    images: ValidationImages
    scores: FinalScores
    observers: Sequence[Observer]  # in the order in which their hooks are called
    start_step: int
    step: int  # steps whose results have been handed to the observers
    result: TrainResult | None = None
    error: Exception | None = None  # that ended it while others went on
    resources: ExitStack = field(default_factory=ExitStack)  # tracker and files

    @property
    def unfinished(self) -> bool:
        """Whether it has steps to do."""
        return self.error is None and self.step < self.resolved.steps

    @property
    def has_unsaved_steps(self) -> bool:
        """Whether its training is in the state after `step`, and no checkpoint need have that."""
        whole = self.training.step == self.step and not self.training.mid_update
        return self.error is None and self.result is None and whole and self.step > self.start_step

    def start(self) -> None:
        """Call the observers before the first step."""
        for observer in self.observers:
            observer.on_start(self.step)

    def end_step(self, losses: Losses, update: Update) -> None:
        """Hand over the numbers of the step that was just done, which may still be on the device."""
        self.metrics.push(self.step, losses, update)

    def save_due_checkpoint(self) -> None:
        """Write a checkpoint every stage.checkpoint_every steps, and after the last step."""
        if self.step == self.resolved.steps or self.resolved.is_due(self.resolved.settings.checkpoint_every, self.step):
            self.save_checkpoint()

    def observe_step(self) -> None:
        """Call the observers after a step that is not the last."""
        settings, step = self.resolved.settings, self.step
        intervals = (settings.validation_loss_every, settings.checkpoint_every, settings.validate_every)
        if any(self.resolved.is_due(every, step) for every in intervals):
            self.metrics.flush()  # nothing is saved or rendered of weights that are not known to be finite
        for observer in self.observers:
            observer.on_step(step)

    def disk_bytes(self) -> tuple[int, int]:
        """What the rest of the run writes in any case, and what it is expected to take in all, in bytes."""
        resolved, settings, left = self.resolved, self.resolved.settings, self.resolved.steps - self.step
        numbers, averages = self.training.params.master.numel(), self.training.average is not None
        checkpoint = round(numbers * (4 + resolved.size.optimizer_state_bytes + 4 * averages))
        lora = numbers * DTYPES[settings.save_dtype].itemsize
        images = len(self.images.specs) * resolved.render.side**2 * PNG_BYTES
        written = 1 + (left // settings.checkpoint_every if settings.checkpoint_every else 0)
        # One more than are kept, because an older one is removed when the new one is whole.
        stored = min(written, settings.keep_checkpoints + 1 - len(checkpoints(resolved.folder)))
        validations = left // settings.validate_every if settings.validate_every else 0
        certain = lora + checkpoint if left else lora
        return certain, certain + max(0, stored - 1) * checkpoint + validations * (lora + images) + images

    def disk_full_error(self, error: DiskFullError) -> RunError:
        """`error` of this run, with the space that the rest needs and how to go on."""
        size, command = self.disk_bytes()[1] / 2**20, resume_command(self.resolved.folder)
        return RunError(f"{error}, the rest of this run takes about {size:.0f} MiB; then resume with: {command}")

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the steps done so far. Raises RunError if a number of theirs is not finite."""
        self.metrics.flush()
        self.artifacts.save_checkpoint(self.step)

    def finish(self) -> TrainResult:
        """Call the observers after the last step, and gather the result."""
        resolved = self.resolved
        self.metrics.flush()
        for observer in self.observers:
            observer.on_end(self.step)
        self.artifacts.install()  # now that images could be drawn with it
        base_scores, scored = self.scores.context.base_scores, self.scores.scored
        self.result = TrainResult(
            stage="train",
            name=resolved.name,
            trigger=resolved.triggers.phrase,
            lora=str(self.artifacts.lora),
            model=self.artifacts.installed and str(self.artifacts.installed),
            steps=self.step,
            seconds=round(time.perf_counter() - resolved.start_time, 1),
            loss=mean_loss(resolved.folder),
            validation_loss=last_validation_loss(resolved.folder) if resolved.settings.validation_loss_every else None,
            scores_before=base_scores and base_scores.scores,
            scores=scored and scored.scores,
            samples=self.images.files(),
        )
        self.resources.close()
        return self.result

    def fail(self, error: Exception) -> None:
        """End this run while others go on; its tracker marks it as failed."""
        self.error = error
        self.resources.__exit__(type(error), error, error.__traceback__)


def check_disk(runs: Sequence[TrainingRun]) -> None:
    """Print where the disk of `runs` may not hold all that they write. Raises InputError where it surely cannot."""
    folder, sizes = runs[0].resolved.folder, [run.disk_bytes() for run in runs]
    certain, expected = (sum(size) for size in zip(*sizes, strict=True))
    free, name = shutil.disk_usage(folder).free, display_path(folder)
    if certain > free:
        other = "" if runs[0].resolved.resumed else ", or choose another disk with hydra.run.dir= or hydra.sweep.dir="
        raise InputError(
            f"{name}: needs at least {certain / 2**20:.1f} MiB on its disk, where {free_space(folder)}: free some "
            f"space{other}"
        )
    if expected > free:
        say(
            f"{name}: takes about {expected / 2**20:.0f} MiB, and {free_space(folder)}: free some space, or use "
            "stage.keep_checkpoints=1 or a larger stage.validate_every"
        )


@contextmanager
def open_run(resolved: ResolvedTraining, training: LoRATraining, context: BaseContext) -> Iterator[TrainingRun]:
    """The run of `training` as `resolved` describes it; its tracker and files are open within the context."""
    settings, step, folder = resolved.settings, training.step, resolved.folder
    # Of a part that was killed; before its first checkpoint the run starts anew, so `resumed` does not tell.
    written = (folder, folder / "lora", folder / "drawn", *folder.glob("samples/*"), *folder.glob("class/*"))
    remove_temporary_files(*written)
    remove_incomplete(folder / "checkpoints")
    with ExitStack() as resources:
        # Shown by the tracker, where it tells the jobs of a sweep apart.
        title = f"{resolved.name} rank {resolved.rank} lr {resolved.lr:g} steps {resolved.steps}"
        tracker = resources.enter_context(
            tracking(
                folder=resolved.folder,
                name=title,
                config=resolved.record,
                resume=resolved.resumed,
                **vars(resolved.tracker),
            )
        )
        measures = bool(settings.validation_loss_every)
        file, measurements = resources.enter_context(metrics_files(resolved.folder, step, measures))

        def image_names(loss: str, index: int) -> list[str]:
            return context.image_names(training, loss, index)

        artifacts = RunArtifacts(resolved, training)
        images = ValidationImages(resolved, artifacts, context.encoder, tracker)
        scores = FinalScores(resolved, artifacts, context, tracker)
        observers: list[Observer] = [artifacts]  # what was learnt is saved before anything is measured or rendered
        if measurements:
            observers.append(ValidationLoss(training, context.validation_data, measurements, tracker))
        observers += [images, scores]
        yield TrainingRun(
            resolved=resolved,
            training=training,
            metrics=StepMetrics(training, tracker, file, image_names),
            artifacts=artifacts,
            images=images,
            scores=scores,
            observers=observers,
            start_step=step,
            step=step,
            resources=resources,
        )
