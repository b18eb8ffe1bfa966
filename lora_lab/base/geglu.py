"""GEGLU (Shazeer 2020, arXiv 2002.05202), the gated layers of transformer blocks, as two products of half the width.

One product gives values and gates as two halves of each row, which the following kernels read element by element. Two
products give two matrices, which are read in whole lines, and whose gradients need not be concatenated. Gating takes a
seventh of SDXL's training step on a GPU otherwise. The GELU's result is not stored but computed again in the backward
pass."""

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from lora_lab.base.quantize import Dense, Fp8Matmul, FrozenWeight, QuantizedLinear


class SplitGEGLU(GEGLU):
    """diffusers' layer in training. It computes as diffusers' class does where its projection has a LoRA, in compiled
    code, and in evaluation mode, so that sampled images are bit-identical to diffusers."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        proj = self.proj
        whole = not self.training or torch.compiler.is_compiling()
        if whole or type(proj) not in (nn.Linear, QuantizedLinear) or _in_fp8(proj):
            return super().forward(hidden_states)
        return _SplitGEGLUFunction.apply(hidden_states, *_halves(proj), *proj.bias.chunk(2))


class _SplitGEGLUFunction(torch.autograd.Function):
    """(x V.T + b) * gelu(x G.T + c), where all but x (..., I) is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, values: FrozenWeight, gates: FrozenWeight, b: Tensor, c: Tensor) -> Tensor:
        value, gate = values.product(x, b), gates.product(x, c)
        ctx.save_for_backward(value, gate)
        ctx.values, ctx.gates = values, gates
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, gate = ctx.saved_tensors
        d_x = ctx.values.backward_product(gradient * F.gelu(gate))
        d_x += ctx.gates.backward_product(torch.ops.aten.gelu_backward(gradient * value, gate))
        return d_x, None, None, None, None


def split_geglu_(network: nn.Module) -> None:
    """Let the gated layers of a frozen `network` compute as above."""
    for module in network.modules():
        if type(module) is GEGLU:
            module.__class__ = SplitGEGLU


def _halves(proj: nn.Linear) -> list[FrozenWeight]:
    """The weights of values and gates, in the memory of the whole."""
    if isinstance(proj, QuantizedLinear):
        return proj.stored.split_rows(2)
    return [Dense(half) for half in proj.weight.detach().chunk(2)]


def _in_fp8(proj: nn.Linear) -> bool:
    """Whether it multiplies in fp8, for which half of a weight would need a copy."""
    return isinstance(proj, QuantizedLinear) and isinstance(proj.stored, Fp8Matmul)
