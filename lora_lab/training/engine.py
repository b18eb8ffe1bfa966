"""The forward and backward passes of one step: the protocol, and the engine for a single LoRA."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lora_lab.adapters.attach import adapters_disabled
from lora_lab.adapters.fused import fuse
from lora_lab.base.cuda_graph import GraphedCallable, GraphPool, Tensors
from lora_lab.settings.schema import Memory
from lora_lab.training.compile import compile_blocks
from lora_lab.training.lora_training import LoRATraining
from lora_lab.training.loss import Batch, per_sample_loss, predict


@dataclass(frozen=True)
class StepBatches:
    """What one training computes its gradient from in one step."""

    character: list[Batch]  # one batch for each accumulation
    prior: list[Batch]  # likewise, of the class; [] without a prior
    dropout_seed: int


Losses = dict[str, Tensor]  # of one training: "loss" () and, with a prior, "prior_loss" ()


class StepEngine(Protocol):
    """Computes gradients. How many LoRAs share a pass, and on how many devices, is the engine's own affair."""

    def forward_backward(self, batches: Sequence[StepBatches]) -> list[Losses]:
        """Add the gradient of each training's batches to its master gradient; returns each training's losses, detached,
        without waiting for the device."""

    def sync_weights(self) -> None:
        """After the updates: compute with the new weights from now on, and set gradients to zero."""


@dataclass(frozen=True)
class SingleStep:
    """One LoRA: any adapter, with a prior and trainable text encoders."""

    training: LoRATraining
    backward: Callable[[Batch], Tensor]  # adds a batch's gradient; returns its share of the loss ()

    def forward_backward(self, batches: Sequence[StepBatches]) -> list[Losses]:
        """See StepEngine."""
        (step_batches,) = batches
        if not self.training.network.training:  # a measurement left evaluation mode; setting all modules takes 10 ms
            self.training.train()
        torch.manual_seed(step_batches.dropout_seed)  # an adapter's dropout is all that draws from it
        losses = {"loss": self._accumulate(step_batches.character)}
        if step_batches.prior:  # after all of the character's, whose dropout is then the same as without a prior
            losses["prior_loss"] = self._accumulate(step_batches.prior)
        return [losses]

    def sync_weights(self) -> None:
        """See StepEngine."""
        self.training.params.copy_to_model()

    def _accumulate(self, batches: Sequence[Batch]) -> Tensor:
        loss = torch.zeros((), device=self.training.params.master.device)
        for batch in batches:
            loss += self.backward(batch)
        return loss


def build_single_step(
    training: LoRATraining,
    memory: Memory,
    compile_mode: str,
    cache: Path | None,
    base_is_prior: bool,
    graphs: GraphPool | None = None,
) -> SingleStep:
    """The engine for one training: fused LoRA layers, compiled blocks, and a step captured in `graphs`, as the settings
    ask. Without `graphs` it runs eagerly.

    With `base_is_prior` the target of a prior batch is what the base predicts, which costs a forward pass."""
    fuse(training.network, training.params)
    compile_blocks(training.network, compile_mode, cache)
    accumulation = training.settings.gradient_accumulation
    networks, encode_texts = list(training.components.values()), training.text_encoders

    def backward(batch: Batch) -> Tensor:
        target = None
        of_prior = batch.prior_weight is not None  # prior batches have a CUDA graph of their own
        if of_prior and base_is_prior:
            with torch.no_grad(), adapters_disabled(*networks):
                target = predict(training.network, training.objective, encode_texts(batch) if encode_texts else batch)
        batch = encode_texts(batch) if encode_texts else batch
        loss = per_sample_loss(training.network, training.objective, batch, target).mean() / accumulation
        training.scaler.scale(loss * batch.prior_weight if of_prior else loss).backward()
        training.params.accumulate_grads()
        return loss.detach()

    pool = graphs if training.captures else None
    return SingleStep(training, captured(backward, pool, memory.cudnn_benchmark))


def captured(
    backward: Callable[[Batch], Tensor], graphs: GraphPool | None, cudnn_benchmark: bool
) -> Callable[[Batch], Tensor]:
    """`backward` run eagerly or, with `graphs`, as one CUDA graph for each shape of batch.

    With `cudnn_benchmark` the first batches of a shape let cuDNN try its convolutions; a graph keeps the fastest."""

    def run(tensors: Tensors) -> Tensor:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, cudnn_benchmark
        try:
            return backward(Batch.from_tensors(tensors))
        finally:
            torch.backends.cudnn.benchmark = before

    run = GraphedCallable(run, graphs) if graphs else run
    return lambda batch: run(batch.tensors())
