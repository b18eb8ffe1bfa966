"""Training: set up, train, finish. `stage=train` and the packed launcher both call this."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

from lora_lab.adapters.inject import DROPOUTS, inject_adapter, load_adapter_weights
from lora_lab.base.cuda_graph import GraphPool
from lora_lab.base.load import base_class
from lora_lab.console import bar, say
from lora_lab.errors import DiskFullError, InputError, RunError
from lora_lab.runs import resume_command, stop_on_signal
from lora_lab.training.base_context import BaseContext, gc_paused, prepare_base
from lora_lab.training.engine import Losses, StepEngine, build_single_step
from lora_lab.training.lora_training import FlatParams, LoRATraining, Update, learning_rate_schedule, load_checkpoint
from lora_lab.training.loss import Objective, objective
from lora_lab.training.memory import out_of_memory_error
from lora_lab.training.randomness import seed_of
from lora_lab.training.resolve import ResolvedTraining
from lora_lab.training.run import TrainingRun, TrainResult, check_disk, describe, open_run
from lora_lab.training.text_encoders import TrainableTextEncoders, freeze_step, inject_text_adapters

MakeEngine = Callable[[Sequence[LoRATraining]], StepEngine]
RunEnded = Callable[[TrainingRun], None]  # with a result or an error


def train(resolved: ResolvedTraining) -> TrainResult:
    """Do one training. Raises KeyboardInterrupt where Ctrl-C stopped it after a checkpoint, RunError if it fails."""
    say(describe(resolved))
    try:
        context = prepare_base(resolved)
        training = start_training(resolved, context, context.encoder.base.network)
        with open_run(resolved, training, context) as run:
            try:
                train_runs([run], context, partial(_single_step, resolved, context.encoder.graphs))
            except DiskFullError as error:
                raise run.disk_full_error(error) from error
            if run.unfinished:
                raise KeyboardInterrupt(
                    f"stopped after step {run.step}; resume with: {resume_command(resolved.folder)}"
                )
            return run.result
    except torch.OutOfMemoryError as error:
        raise out_of_memory_error(resolved.memory, resolved.batch_size, resolved.folder) from error


def train_runs(
    runs: Sequence[TrainingRun], context: BaseContext, make_engine: MakeEngine, on_end: RunEnded | None = None
) -> None:
    """Train `runs` on one base to their last steps. If Ctrl-C stops them or memory runs out, each writes a checkpoint.

    With `on_end` the failure of one run does not end the others. It is called for each run when it ends, with a result
    or an error."""
    group = RunGroup(runs, context, make_engine, on_end)
    check_disk(runs)
    group.activate(group.first_step)  # before the first measurement: the engine fuses layers
    for run in runs:
        run.start()
    with group.checkpoints_on_out_of_memory():
        train_steps(group)
        for run in runs:
            if run.unfinished:
                run.save_checkpoint()
            else:
                group.finish(run)


def train_steps(group: "RunGroup") -> None:
    """Do the remaining steps of the runs of `group`; after Ctrl-C only the present one."""
    with stop_on_signal(group.runs[0].resolved.folder) as stop_requested, group.progress_bar() as progress:
        for step in group.steps():
            trainings = group.start_step(step)
            batches = [group.context.batches(training, step) for training in trainings]
            losses = group.engine.forward_backward(batches)
            updates = [training.clip_and_update() for training in trainings]
            group.engine.sync_weights()
            group.end_step(losses, updates)
            progress.set_postfix(group.latest_metrics(), refresh=False)
            progress.update(group.first_step - progress.n)
            if stop_requested():
                break
        group.flush_metrics()


@dataclass
class RunGroup:
    """Runs that share every step: which of them have a step to do, which engine does it, and what ends one of them."""

    runs: Sequence[TrainingRun]
    context: BaseContext
    make_engine: MakeEngine
    on_end: RunEnded | None
    engine: StepEngine | None = None
    engine_trainings: Sequence[LoRATraining] = ()
    active: Sequence[TrainingRun] = ()  # the runs that do the current step

    @property
    def first_step(self) -> int:
        """How many steps the run furthest behind has done; if all are finished, `last_step`."""
        return min((run.step for run in self.runs if run.unfinished), default=self.last_step)

    @property
    def last_step(self) -> int:
        """The last step of the longest run."""
        return max(run.resolved.steps for run in self.runs)

    def steps(self) -> Iterator[int]:
        """Every step that a run still has to do, as the number of steps before it."""
        while any(run.unfinished for run in self.runs):
            yield self.first_step

    def progress_bar(self) -> tqdm:
        """The bar of the longest run's steps."""
        return bar(total=self.last_step, initial=self.first_step, desc="train", unit="step")

    def start_step(self, step: int) -> list[LoRATraining]:
        """The trainings that do the step after `step`, with an engine for them."""
        trainings = self.activate(step)
        for run in self.active:
            run.metrics.start_step()
        return trainings

    def activate(self, step: int) -> list[LoRATraining]:
        """Choose the runs that do the step after `step`, and build an engine if their trainings have changed."""
        self.active = [run for run in self.runs if run.unfinished and run.step == step]
        trainings = list({id(run.training): run.training for run in self.active}.values())
        if list(map(id, trainings)) != list(map(id, self.engine_trainings)):
            if self.engine is not None:
                self.engine = None
                gc.collect()  # free the memory of one engine before the next needs it
            with gc_paused():
                self.engine, self.engine_trainings = self.make_engine(trainings), trainings
        return trainings

    def end_step(self, losses: Sequence[Losses], updates: Sequence[Update]) -> None:
        """Hand the results of the engine's trainings to their runs; then let the runs' observers work."""
        results = {id(t): result for t, *result in zip(self.engine_trainings, losses, updates, strict=True)}
        for run in self.active:
            run.step += 1
        for run in self.active:  # the numbers of all, before rendering the images of one may run out of memory
            with self.isolated(run):
                run.end_step(*results[id(run.training)])
        for run in self.active:  # of all, so that a kill leaves all at one step: only then they go on as one pack
            with self.isolated(run):
                if run.error is None:
                    run.save_due_checkpoint()
        for run in self.active:
            with self.isolated(run):
                if run.unfinished:
                    run.observe_step()
                elif run.step < self.last_step:  # it ends while longer runs go on
                    self.finish(run)

    def finish(self, run: TrainingRun) -> None:
        """Finish a run that has done all its steps, unless it has ended already."""
        if run.error is None and run.result is None:
            with self.isolated(run):
                run.finish()
                if self.on_end is not None:
                    self.on_end(run)

    def flush_metrics(self) -> None:
        """Wait for the numbers of all steps."""
        for run in self.runs:
            if run.error is None and run.result is None:
                with self.isolated(run):
                    run.metrics.flush()

    def latest_metrics(self) -> dict[str, str]:
        """What the progress bar shows: the mean loss and the first run's learning rate."""
        latest = [run.metrics.latest for run in self.runs if run.metrics.latest and run.error is None]
        if not latest:
            return {}
        loss = sum(metrics["loss"] for metrics in latest) / len(latest)
        return {"loss": f"{loss:.4f}", "lr": f"{latest[0]['lr']:.1e}"}

    @contextmanager
    def isolated(self, run: TrainingRun) -> Iterator[None]:
        """Within the context an error ends this run alone, if the group has an `on_end`."""
        try:
            yield
        except (RunError, InputError, OSError) as error:
            if self.on_end is None:
                raise
            if isinstance(error, DiskFullError):
                error = run.disk_full_error(error)
            with suppress(type(error)):
                run.fail(error)
            self.on_end(run)

    @contextmanager
    def checkpoints_on_out_of_memory(self) -> Iterator[None]:
        """Within the context running out of GPU memory, say at the first image of another size, leaves checkpoints."""
        try:
            yield
        except torch.OutOfMemoryError:
            for run in self.runs:
                if run.has_unsaved_steps:
                    with self.isolated(run):
                        run.save_checkpoint()
            raise


def _single_step(resolved: ResolvedTraining, graphs: GraphPool, trainings: Sequence[LoRATraining]) -> StepEngine:
    (training,) = trainings
    base_is_prior = resolved.prior.kind == "prediction"
    return build_single_step(training, resolved.memory, resolved.compile, resolved.cache, base_is_prior, graphs)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one learning rate."""

    params: list[nn.Parameter]
    options: dict[str, float] = field(default_factory=dict)  # of the optimizer, where they differ from its defaults
    freeze_after: int | None = None  # steps after which the group is frozen


def start_training(resolved: ResolvedTraining, context: BaseContext, network: nn.Module) -> LoRATraining:
    """Build the training on `network` (the base's, or a clone that shares its weights), and load the checkpoint or the
    LoRA that it starts from. Raises InputError for one that does not fit."""
    base = context.encoder.base
    with gc_paused():
        text_encoders = None
        if resolved.text.learns:
            text_encoders = inject_text_adapters(
                base, resolved.device, resolved.text, resolved.triggers.phrase, resolved.seed, resolved.adapter
            )
        training = build_training(network, objective(resolved.loss, base), resolved, text_encoders)
    if resolved.resume_from:
        load_checkpoint(resolved.resume_from, training)
    elif resolved.start_lora:
        with training.params.in_fp32():
            load_adapter_weights(base, resolved.start_lora)
        if training.average is not None:
            training.average.copy_(training.params.master.detach())
    return training


def build_training(
    network: nn.Module,
    loss_objective: Objective,
    resolved: ResolvedTraining,
    text_encoders: TrainableTextEncoders | None = None,
) -> LoRATraining:
    """Inject a fresh adapter into `network`, and build optimizer and schedule of all trainable parameters.

    Raises InputError for an adapter that does not fit the network."""
    torch.manual_seed(seed_of(resolved.seed, "adapter"))
    inject_adapter(network, resolved.adapter)
    # Dropout alone draws random numbers in a step. Keeping its state for recomputation waits for the device once a
    # block, which also rules out a CUDA graph.
    dropout = any(getattr(resolved.adapter, key, 0.0) for key in DROPOUTS)
    if resolved.memory.gradient_checkpointing:
        network.enable_gradient_checkpointing(
            lambda module, *args: recompute(module.__call__, *args, use_reentrant=False, preserve_rng_state=dropout)
        )
    groups = parameter_groups(network, text_encoders, resolved)
    params = FlatParams([p for group in groups for p in group.params], resolved.dtype)
    optimizer = build_optimizer(params, groups, resolved)
    if resolved.traits.averages_weights:  # see LoRATraining.swap_in_saved_weights
        optimizer.train()
    frozen_from = [group.freeze_after for group in groups]
    return LoRATraining(
        network=network,
        network_name=base_class(resolved.model).network_name,
        params=params,
        optimizer=optimizer,
        optimizer_averages=resolved.traits.averages_weights,
        schedule=learning_rate_schedule(optimizer, resolved.schedule, resolved.steps, frozen_from),
        scaler=torch.amp.GradScaler(resolved.device.type, enabled=resolved.dtype == torch.float16),
        settings=resolved.settings,
        objective=loss_objective,
        batch_size=resolved.batch_size,
        seed=resolved.seed,
        average=params.master.detach().clone() if resolved.settings.ema_decay else None,
        text_encoders=text_encoders,
        freeze_after=[
            (parameter.grad, last_step)
            for last_step, group in zip(frozen_from, optimizer.param_groups, strict=True)
            for parameter in group["params"]
            if last_step is not None
        ],
        captures=resolved.memory.capture and resolved.device.type == "cuda" and not dropout,
    )


def parameter_groups(
    network: nn.Module, text_encoders: TrainableTextEncoders | None, resolved: ResolvedTraining
) -> list[ParameterGroup]:
    """All trainable parameters: the network's adapter first, then those of the text encoders, then new tokens."""
    text, ratio = resolved.text, resolved.settings.lora_plus_ratio
    groups = _adapter_groups(network, resolved.lr, ratio, {}, None)
    for position in text.adapted:
        lr = resolved.lr if text.encoder_lr is None else text.encoder_lr
        last_step = _last_step(text.encoder_stop, resolved.steps)
        groups += _adapter_groups(list(text_encoders.encoders.values())[position], lr, ratio, {"lr": lr}, last_step)
    if text.tokens:
        vectors = [tokens.vectors for tokens in text_encoders.tokens.values()]
        options = {
            "lr": text.token_lr,
            "weight_decay": 0.0,
        }  # zero is no better than where an embedding starts
        groups.append(ParameterGroup(vectors, options, _last_step(text.token_stop, resolved.steps)))
    return groups


def _adapter_groups(
    module: nn.Module, lr: float, ratio: float, options: dict[str, float], freeze_after: int | None
) -> list[ParameterGroup]:
    """An adapter's parameters, the B matrices after all others, so that those of q, k and v are neighbours.

    Where `ratio` is not 1 the B matrices have `ratio` times the learning rate `lr` (LoRA+, Hayou et al. 2024)."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and not name.endswith(".vectors")]
    others, b_matrices = ([p for name, p in named if (".lora_B." in name) == is_b] for is_b in (False, True))
    if ratio == 1:
        return [ParameterGroup([*others, *b_matrices], options, freeze_after)]
    return [
        ParameterGroup(others, options, freeze_after),
        ParameterGroup(b_matrices, options | {"lr": lr * ratio}, freeze_after),
    ]


def _last_step(fraction: float, steps: int) -> int | None:
    return freeze_step(fraction, steps) if fraction < 1 else None


def build_optimizer(
    params: FlatParams, groups: list[ParameterGroup], resolved: ResolvedTraining
) -> torch.optim.Optimizer:
    """The optimizer of `params`, whose parameters are those of `groups` in their order."""
    if len(groups) == 1:
        return resolved.make_optimizer([params.master] if resolved.traits.elementwise else params.matrices())
    counts = [len(group.params) for group in groups]
    if resolved.traits.elementwise:
        parts = [[part] for part in params.split(counts)]
    else:
        matrices = iter(params.matrices())
        parts = [list(islice(matrices, count)) for count in counts]
    return resolved.make_optimizer(
        [{"params": part, **group.options} for part, group in zip(parts, groups, strict=True)]
    )
