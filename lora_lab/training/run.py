"""A run around its job: what it writes down, measures, keeps and draws while and after its steps are done."""

import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from lora_lab.base.encode import Encoder
from lora_lab.board.curves import loss_plot, read_metrics
from lora_lab.console import say
from lora_lab.errors import RunError
from lora_lab.evaluation.metrics import Scores
from lora_lab.evaluation.scores import ScoredImages, Scorer, numbers, rows, table, write_lines
from lora_lab.settings.schema import Config
from lora_lab.track import tracking
from lora_lab.training.artifacts import RunArtifacts, install_lora
from lora_lab.training.async_metrics import AsyncMetrics
from lora_lab.training.data import TrainingData
from lora_lab.training.plan import Plan
from lora_lab.training.prior import PriorData
from lora_lab.training.step import Job
from lora_lab.training.validation import validation_loss
from lora_lab.training.validation_images import ValidationImages

METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"  # of every step, and of what is measured between


@dataclass(frozen=True)
class TrainResult:
    stage: str
    name: str
    trigger: str
    lora: str  # the finished file, in the run folder
    model: str | None  # its copy in models/lora, if it was published
    steps: int
    seconds: float  # wall time since the run began, loading and drawing included
    loss: float  # mean of the last 50 steps
    validation_loss: float | None  # of the finished LoRA; None without stage.validation_loss_every
    scores_before: Scores | None  # of the base without the LoRA; None without model.judge
    scores: Scores | None  # docs/scores.md
    samples: dict[str, list[str]]  # step to its validation pictures


@dataclass(frozen=True)
class Base:
    """What runs of one dataset on one base have in common."""

    encoder: Encoder
    data: TrainingData
    prior: PriorData | None
    measured: TrainingData  # for the validation loss
    scorer: Scorer | None
    before: ScoredImages | None  # the scores of the base alone


class Run:
    """The run of `config` in `folder` from the step that its `job` has reached. A context: it ends with what it opened.

    Several runs may follow one job, each up to its own `steps`."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        folder: Path,
        job: Job,
        base: Base,
        done: int,
        began: float,
        ended: Callable[["Run", Exception | None], None] = lambda run, error: None,
    ) -> None:
        """`ended` is called when it is done, or with the error for which it left the others."""
        self.config, self.folder, self.job, self.steps, self.reached = config, folder, job, config.steps, done
        self.updating = False  # between what `reached` says and the next step: no state to go on from
        self.error: Exception | None = None  # for which it left the others
        self.result: TrainResult | None = None
        self.latest: dict[str, float] = {}
        self._base, self._began, self._done, self._ended = base, began, done, ended
        self._keep, self._look = (
            RunArtifacts(job, config, plan, folder),
            ValidationImages(base.encoder, config, plan.render, folder),
        )
        self._look.base()
        self._render = plan.render
        pictures = job.batch_size * job.settings.gradient_accumulation
        self._readings = AsyncMetrics(pictures, job.learnt.master.device, self._seen)

    def __enter__(self) -> "Run":
        config, stage, done = self.config, self.config.stage, self._done
        self._opened = ExitStack()
        # Tells the jobs of a sweep apart.
        shown = f"{config.name} rank {config.rank} lr {config.rate:g} steps {config.steps}"
        tracker = tracking(
            folder=self.folder, name=shown, config=asdict(config), resume=bool(config.resume), **vars(config.tracker)
        )
        self._track = self._opened.enter_context(tracker)
        self._metrics = MetricsFile(self.folder / METRICS, done)
        # The first and the last measurement stand outside the loop and are made again by whoever goes on from there.
        known = done if 0 < done < self.steps else done - 1
        self._measurements = MetricsFile(self.folder / VALIDATION, known) if stage.validation_loss_every else None
        self._opened.callback(self._close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, traceback)

    def fail(self, error: Exception) -> None:
        """Leave the runs that train beside this one."""
        self.error = error
        with suppress(type(error)):  # the tracker marks it as failed, and lets it pass
            self.__exit__(type(error), error, error.__traceback__)
        self._ended(self, error)

    @property
    def left(self) -> bool:
        """Whether it has steps to do."""
        return self.error is None and self.reached < self.steps

    @property
    def unkept(self) -> bool:
        """Whether it has done steps that it can go on from, and is not over."""
        return self.error is None and self.result is None and self.reached > self._done and not self.updating

    def begin(self) -> None:
        if self.reached == 0:
            self._measure(0)

    def step_begins(self) -> None:
        self._readings.begin()

    def step_ends(self) -> None:
        self.reached, self.updating = self.reached + 1, False

    def put(self, loss: Tensor, norm: Tensor, lr: float, **others: Tensor) -> None:
        """The numbers of the step that has ended, on their way."""
        self._readings.put(self.reached, loss, norm, lr, **others)

    def after_step(self) -> None:
        """What is due is done with the weights that all numbers are known of."""
        stage, step = self.config.stage, self.reached

        def due(every: int) -> bool:
            return every > 0 and step % every == 0 and step < self.steps  # the last step has its turn at the end

        if any(map(due, (stage.validation_loss_every, stage.checkpoint_every, stage.validate_every))):
            self.settle()
        if due(stage.validation_loss_every):
            self._measure(step)  # before the checkpoint, so that whoever goes on from that has it
        if due(stage.checkpoint_every):
            self.checkpoint()
        if due(stage.validate_every):
            lora = self._keep.lora(step, f"{self.config.name}-{step:06d}")
            self._track.images(step, self._look.validate(lora, step))

    def settle(self) -> None:
        """Wait for all numbers. Raises RunError for a bad one."""
        self._readings.settle()

    def checkpoint(self) -> None:
        self._keep.checkpoint(self.reached)

    def finish(self) -> TrainResult:
        """All steps are done: keep, publish, and only then look."""
        config = self.config
        self.settle()
        self.checkpoint()
        self._measure(self.reached)
        lora = self._keep.lora(self.reached, config.name)
        self._track.images(self.reached, self._look.validate(lora, self.reached))
        published = None if config.publish is False else str(install_lora(lora, config.name))
        before = self._base.before
        scored = before and self._base.scorer.score(
            lora, self._render, self.folder / "samples" / "score", self._base.encoder
        )
        if scored:
            write_lines(self.folder, [before, scored])
            say(table([before, scored]))
            self._track.numbers(self.reached, numbers(scored.scores))
            self._track.table(self.reached, rows(scored, config.rank, config.rate, self.reached))
        validation = read_metrics(self.folder / VALIDATION) if config.stage.validation_loss_every else None
        self.result = TrainResult(
            stage="train",
            name=config.name,
            trigger=config.trigger,
            lora=str(lora),
            model=published,
            steps=self.reached,
            seconds=round(time.perf_counter() - self._began, 1),
            loss=statistics.mean(line["loss"] for line in read_metrics(self.folder / METRICS)[-50:]),
            validation_loss=validation and validation[-1]["loss"],
            scores_before=before and before.scores,
            scores=scored and scored.scores,
            samples=self._look.samples(),
        )
        self._opened.close()
        self._ended(self, None)
        return self.result

    def _measure(self, step: int) -> None:
        if self._measurements:
            loss = validation_loss(self.job, self._base.measured, self.config.stage.validation_timesteps)
            self._measurements.write(step, {"loss": loss})
            self._track.numbers(step, {"validation/loss": loss})

    def _seen(self, step: int, numbers: dict[str, float]) -> None:
        self._refuse_not_finite(step, numbers)
        self._metrics.write(step, numbers)
        self._track.numbers(step, {f"train/{key}": value for key, value in numbers.items()})
        self.latest = numbers

    def _refuse_not_finite(self, step: int, numbers: dict[str, float]) -> None:
        job, prior = self.job, self._base.prior
        # The scaler of float16 expects gradients that overflow: it leaves the update out and scales less.
        finite = {"loss": "loss"} | ({"prior_loss": "prior's loss"} if prior else {})
        finite |= {} if job.scaler.is_enabled() else {"grad_norm": "gradient's norm"}
        for key, what in finite.items():
            if not math.isfinite(numbers[key]):
                source, parts = prior if key == "prior_loss" else self._base.data, job.settings.gradient_accumulation
                names = ", ".join(source.names(seed=job.seed, step=step - 1, parts=parts, batch_size=job.batch_size))
                raise RunError(
                    f"the {what} of step {step} is {numbers[key]}, at {names}: lower lr, or look at these pictures; "
                    f"the last checkpoint is from before it"
                )

    def _close(self) -> None:
        """Of the files of numbers; they are drawn as they are."""
        self._metrics.close()
        if self._measurements:
            self._measurements.close()
        validation = read_metrics(self.folder / VALIDATION) if self._measurements else []
        loss_plot(read_metrics(self.folder / METRICS), validation, self.folder / "loss.png")


class MetricsFile:
    """metrics.jsonl: one line a step. Going on from a checkpoint drops the lines that come after it."""

    def __init__(self, path: Path, start: int) -> None:
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= start]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self.path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    return [s for s in path.read_text(encoding="utf-8").splitlines() if s.endswith("}")] if path.is_file() else []
