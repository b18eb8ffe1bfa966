"""The forward and backward passes of one step: the protocol, and the engine for a single LoRA.

Blocks of the network may be compiled with torch: fewer and faster kernels, for seconds or minutes before the first
step. Each block is compiled by itself, since a network repeats few kinds of them many times. Compiled code is kept on
disk, where the next process that computes the same finds it."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from lora_lab.adapters.fused import fuse
from lora_lab.adapters.inject import adapters_disabled
from lora_lab.base.cuda_graph import GraphedCallable, GraphPool, Tensors
from lora_lab.settings.schema import Memory
from lora_lab.training.lora_training import LoRATraining
from lora_lab.training.loss import Batch, per_sample_loss, predict

RECOMPILE_LIMIT = 128  # compiled variants of one function: one for every width of a block and size of image


class GroupNorm(nn.Module):
    """nn.GroupNorm, whose own forward torch.compile skips."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def compile_blocks(network: nn.Module, mode: str, cache: Path | None, backend: str = "inductor") -> None:
    """Let `network` compile when it first runs: nothing (`off`), its transformer blocks (`blocks`), or ResNet blocks
    and norms too, with convolutions in the memory layout that they prefer (`full`).

    Compiled code is kept in `cache`/compiled, or where torch puts it."""
    if mode == "off":
        return
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute() / "compiled"))
    torch._dynamo.config.automatic_dynamic_shapes = False  # there are few sizes, and each has its own CUDA graph
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    kinds = (BasicTransformerBlock,)
    if mode == "full":
        kinds += (ResnetBlock2D, GroupNorm)
        network.to(memory_format=torch.channels_last)
        for module in [m for m in network.modules() if isinstance(m, Transformer2DModel)]:
            module.norm = GroupNorm(module.norm)
    for module in network.modules():
        if isinstance(module, kinds):
            module.compile(backend=backend, dynamic=False)


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
