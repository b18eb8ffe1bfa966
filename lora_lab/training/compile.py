"""The UNet's blocks compiled by torch: fewer and better kernels, for seconds or minutes before the first step.

A block is compiled by itself, since SDXL repeats few of them many times. What was compiled lies on disk, where the next
process that computes the same finds it."""

import os
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

SHAPES = 128  # graphs that one function may have: one for every width of a block and size of picture


class GroupNorm(nn.Module):
    """nn.GroupNorm, whose own forward torch.compile passes over."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def compile_blocks(unet: UNet2DConditionModel, how: str, cache: Path | None, backend: str = "inductor") -> None:
    """Let `unet` compile when it first runs: nothing (`off`), its transformer blocks (`blocks`), or ResNet blocks and
    norms too, with convolutions in the layout that they prefer (`full`).

    What it makes is kept in `cache`/compiled, or where torch puts it."""
    if how == "off":
        return
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute() / "compiled"))
    torch._dynamo.config.automatic_dynamic_shapes = False  # sizes are few, and each is recorded as a graph of its own
    torch._dynamo.config.recompile_limit = SHAPES
    kinds = (BasicTransformerBlock,)
    if how == "full":
        kinds += (ResnetBlock2D, GroupNorm)
        unet.to(memory_format=torch.channels_last)
        for module in [m for m in unet.modules() if isinstance(m, Transformer2DModel)]:
            module.norm = GroupNorm(module.norm)
    for module in unet.modules():
        if isinstance(module, kinds):
            module.compile(backend=backend, dynamic=False)
