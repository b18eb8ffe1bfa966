"""One run: a training up to its own last step, its observers, and its result."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from lora_lab.evaluation.metrics import Scores
from lora_lab.track import tracking
from lora_lab.training.artifacts import RunArtifacts
from lora_lab.training.base_context import BaseContext
from lora_lab.training.engine import Losses
from lora_lab.training.lora_training import LoRATraining, Update
from lora_lab.training.metrics import StepMetrics, last_validation_loss, mean_loss, metrics_files
from lora_lab.training.observer import Observer
from lora_lab.training.resolve import ResolvedTraining
from lora_lab.training.score_observer import FinalScores
from lora_lab.training.validation_images import ValidationImages
from lora_lab.training.validation_loss import ValidationLoss


@dataclass(frozen=True)
class TrainResult:
    """result.json of a training."""

    stage: str
    name: str
    trigger: str
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

    def observe_step(self) -> None:
        """Call the observers after a step that is not the last."""
        settings, step = self.resolved.settings, self.step
        intervals = (settings.validation_loss_every, settings.checkpoint_every, settings.validate_every)
        if any(self.resolved.is_due(every, step) for every in intervals):
            self.metrics.flush()  # nothing is saved or rendered of weights that are not known to be finite
        for observer in self.observers:
            observer.on_step(step)

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
        base_scores, scored = self.scores.context.base_scores, self.scores.scored
        self.result = TrainResult(
            stage="train",
            name=resolved.name,
            trigger=resolved.trigger,
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


@contextmanager
def open_run(resolved: ResolvedTraining, training: LoRATraining, context: BaseContext) -> Iterator[TrainingRun]:
    """The run of `training` as `resolved` describes it; its tracker and files are open within the context."""
    settings, step = resolved.settings, training.step
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
