"""Compile the network's blocks with torch: fewer and faster kernels, for seconds or minutes before the first step.

Each block is compiled by itself, since a network repeats few kinds of them many times. Compiled code is kept on disk,
where the next process that computes the same finds it."""

import os
from pathlib import Path

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

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
