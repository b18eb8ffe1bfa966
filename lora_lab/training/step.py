"""One step of one LoRA: backward passes, captured where a GPU allows it, and the update."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from lora_lab.capture import Captured, Tensors
from lora_lab.schema import Schedule, Train
from lora_lab.training.flat import Flat
from lora_lab.training.loss import Batch, Objective, sample_losses


@dataclass(frozen=True)
class Job:
    """One LoRA in training: what learns, how, and until when."""

    unet: UNet2DConditionModel  # with the adapter in it
    learnt: Flat
    optimizer: torch.optim.Optimizer  # of learnt.master, as one tensor or matrix by matrix
    schedule: LRScheduler
    scaler: torch.amp.GradScaler  # of the loss; enabled for float16 alone
    settings: Train
    asked: Objective
    steps: int
    batch_size: int
    seed: int
    average: Tensor | None  # of learnt.master over the steps; None without stage.ema_decay
    backward: Callable[[Batch], Tensor]  # adds a batch's share to the gradient, gives its share of the loss

    def update(self) -> Tensor:
        """Let the optimizer use the gradient; returns its norm before clipping, and waits for no number."""
        self.scaler.unscale_(self.optimizer)
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


def learning_rates(optimizer: torch.optim.Optimizer, settings: Schedule, steps: int) -> LRScheduler:
    """The schedule of `optimizer`'s learning rate over `steps`, by its name in diffusers."""
    return get_scheduler(
        settings.name,
        optimizer,
        num_warmup_steps=settings.warmup_steps(steps),
        num_training_steps=steps,
        num_cycles=settings.cycles,
        power=settings.power,
    )


def backward_pass(
    unet: UNet2DConditionModel, learnt: Flat, scaler: torch.amp.GradScaler, asked: Objective, parts: int, capture: bool
) -> Callable[[Batch], Tensor]:
    """What `Job.backward` is: one function, run eagerly or, with `capture`, as a CUDA graph for each kind of batch."""

    def run(inputs: Tensors) -> Tensor:
        loss = sample_losses(unet, asked, Batch(**inputs)).mean() / parts
        scaler.scale(loss).backward()
        learnt.collect()
        return loss.detach()

    run = Captured(run, learnt.working.device) if capture else run
    return lambda batch: run({name: value for name, value in vars(batch).items() if value is not None})
