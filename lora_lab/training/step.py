"""One step of one LoRA: backward passes, captured where a GPU allows it, and the update."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lora_lab.adapters.attach import adapters_disabled
from lora_lab.base.cuda_graph import GraphedCallable, GraphPool, Tensors
from lora_lab.settings.schema import Schedule, Train
from lora_lab.training.flat import FlatParams
from lora_lab.training.loss import Batch, Objective, per_sample_loss, predict
from lora_lab.training.text_encoders import TrainableTextEncoders


@dataclass(frozen=True)
class Job:
    """One LoRA in training: what learns, how, and until when."""

    unet: nn.Module  # with the adapter in it
    learnt: FlatParams
    optimizer: torch.optim.Optimizer  # of learnt.master, as one tensor or matrix by matrix
    schedule: LRScheduler
    scaler: torch.amp.GradScaler  # of the loss; enabled for float16 alone
    settings: Train
    asked: Objective
    steps: int
    batch_size: int
    seed: int
    average: Tensor | None  # of learnt.master over the steps; None without stage.ema_decay
    # Adds a batch's share to the gradient, gives its share of the loss; of the prior's before its weight.
    backward: Callable[[Batch], Tensor]
    read: TrainableTextEncoders | None = None  # encodes a batch's texts, if something of that learns
    ends: Sequence[tuple[Tensor, int]] = ()  # parts of the gradient, and the steps after which they count no more

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What runs inside a step, by its names in the pipeline."""
        return {"unet": self.unet} | (self.read.encoders if self.read else {})

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """Of these what has an adapter in training."""
        return {name: part for name, part in self.parts.items() if getattr(part, "peft_config", None)}

    @cached_property
    def names(self) -> list[str]:
        """Of all that learns, in the order of learnt.parameters: unet.down_blocks.1..., text_encoder...."""
        known = {p: f"{part}.{name}" for part, network in self.parts.items() for name, p in network.named_parameters()}
        return [known[p] for p in self.learnt.parameters]

    def state(self) -> dict[str, Tensor]:
        """What learns in float32 by its names, in one piece of the CPU's memory, which on a CPU is where it learns."""
        numbers = self.learnt.master.detach()
        if numbers.is_cuda:  # pinned memory, which torch keeps for the next time, takes them many times as fast
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers)
        return dict(zip(self.names, self.learnt.views(numbers.cpu()), strict=True))

    def mode(self, training: bool) -> None:
        """Let dropout, and what is recomputed, be as in training or as in drawing."""
        for part in self.parts.values():
            part.train(training)

    def update(self) -> Tensor:
        """Let the optimizer use the gradient; returns its norm before clipping, and waits for no number."""
        self.scaler.unscale_(self.optimizer)
        for gradient, stop in self.ends:
            if self.schedule.last_epoch >= stop:  # its learning rate is 0, and it must not shorten the others'
                gradient.zero_()
        norm = self.learnt.clip(self.settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            with torch.no_grad():
                kept = ema_decay(self.settings.ema_decay, self.schedule.last_epoch)
                self.average.lerp_(self.learnt.master, 1 - kept)
        self.schedule.step()
        self.learnt.publish()
        return norm

    def rate(self) -> float:
        """What the next update goes by: the learning rate, times the distance that Prodigy has found so far."""
        group = self.optimizer.param_groups[0]
        return group["lr"] * group.get("d", 1.0)

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Within the context what learns is what is saved and drawn; then it is again, to the bit, what it was.

        They differ where an average is kept: by `average`, or by the optimizer itself, as schedule-free ones do."""
        averages = hasattr(self.optimizer, "eval")
        if not averages and self.average is None:
            yield
            return
        here = self.learnt.master.detach().clone()
        if averages:
            self.optimizer.eval()
        self.learnt.become(self.learnt.master if self.average is None else self.average)
        try:
            yield
        finally:
            if averages:
                self.optimizer.train()
            self.learnt.become(here)  # an optimizer's own way back is a sum, and rounds


def ema_decay(most: float, done: int) -> float:
    """The share of the average that the update after `done` others keeps: min(most, (1 + done) / (10 + done)).

    So the start is soon forgotten. Source: TensorFlow's ExponentialMovingAverage with num_updates."""
    return min(most, (1 + done) / (10 + done))


def learning_rates(
    optimizer: torch.optim.Optimizer, settings: Schedule, steps: int, stops: Sequence[int | None] = ()
) -> LRScheduler:
    """The schedule of `optimizer`'s learning rate over `steps`, by its name in diffusers.

    `stops` are the steps after which its groups have a rate of 0, or None."""
    schedule = get_scheduler(
        settings.name,
        optimizer,
        num_warmup_steps=settings.warmup_steps(steps),
        num_training_steps=steps,
        num_cycles=settings.cycles,
        power=settings.power,
    )
    for i, stop in enumerate(stops):
        if stop is not None:
            schedule.lr_lambdas[i] = _ending(schedule.lr_lambdas[i], stop)
    return schedule


def _ending(factor: Callable[[int], float], stop: int) -> Callable[[int], float]:
    return lambda step: factor(step) if step < stop else 0.0


def backward_pass(
    unet: nn.Module,
    learnt: FlatParams,
    scaler: torch.amp.GradScaler,
    asked: Objective,
    parts: int,
    graphs: GraphPool | None,
    cudnn_benchmark: bool,
    read: TrainableTextEncoders | None,
    base_is_prior: bool,
) -> Callable[[Batch], Tensor]:
    """What `Job.backward` is, by `of_batches`.

    With `base_is_prior` the target of a batch of the prior is what the base predicts; that costs a forward pass."""

    networks = [unet, *(read.encoders.values() if read else [])]

    def run(batch: Batch) -> Tensor:
        target = None
        of_prior = batch.prior_weight is not None  # another kind of batch, so another graph
        if of_prior and base_is_prior:
            with torch.no_grad(), adapters_disabled(*networks):
                target = predict(unet, asked, read(batch) if read else batch)
        batch = read(batch) if read else batch
        loss = per_sample_loss(unet, asked, batch, target).mean() / parts
        scaler.scale(loss * batch.prior_weight if of_prior else loss).backward()
        learnt.collect()
        return loss.detach()

    return of_batches(run, graphs, cudnn_benchmark)


def of_batches(
    function: Callable[[Batch], Tensor], graphs: GraphPool | None, cudnn_benchmark: bool
) -> Callable[[Batch], Tensor]:
    """`function` run eagerly or, with `graphs`, as a CUDA graph for each kind of batch.

    With `cudnn_benchmark` the first of a kind try convolutions out, which those that are recorded then use."""

    def run(inputs: Tensors) -> Tensor:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, cudnn_benchmark
        try:
            return function(Batch.from_tensors(inputs))
        finally:
            torch.backends.cudnn.benchmark = before

    run = GraphedCallable(run, graphs) if graphs else run
    return lambda batch: run(batch.tensors())
