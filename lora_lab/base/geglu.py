"""The transformer blocks' gated layers (GEGLU, Shazeer 2020, arXiv 2002.05202) in products of half the width.

What one product makes as two halves of its rows, kernels read number by number; two products make two matrices, which
are read in whole lines, and their gradients need not be put together again. A seventh of SDXL's step on a GPU is gating
otherwise. Of the gelu nothing is kept for the way back: it is made again."""

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from lora_lab.base.quantize import Dense, Fp8Matmul, FrozenWeight, QuantizedLinear


class SplitGEGLU(GEGLU):
    """What diffusers' layer becomes in training. It is what it was where its projection wears a LoRA, in compiled code,
    and in evaluation mode, so that what is drawn is what diffusers draws."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        proj = self.proj
        whole = not self.training or torch.compiler.is_compiling()
        if whole or type(proj) not in (nn.Linear, QuantizedLinear) or _in_fp8(proj):
            return super().forward(hidden_states)
        return _SplitGEGLUFunction.apply(hidden_states, *_halves(proj), *proj.bias.chunk(2))


class _SplitGEGLUFunction(torch.autograd.Function):
    """(x V.T + b) * gelu(x G.T + c), all but x frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, values: FrozenWeight, gates: FrozenWeight, b: Tensor, c: Tensor) -> Tensor:
        value, split_geglu_ = values.product(x, b), gates.product(x, c)
        ctx.save_for_backward(value, split_geglu_)
        ctx.values, ctx.gates = values, gates
        return value * F.gelu(split_geglu_)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, split_geglu_ = ctx.saved_tensors
        back = ctx.values.back(gradient * F.gelu(split_geglu_))
        back += ctx.gates.back(torch.ops.aten.gelu_backward(gradient * value, split_geglu_))
        return back, None, None, None, None


def split_geglu_(unet: nn.Module) -> None:
    """Let the gated layers of a `unet` whose base does not learn compute as above."""
    for module in unet.modules():
        if type(module) is GEGLU:
            module.__class__ = SplitGEGLU


def _halves(proj: nn.Linear) -> list[FrozenWeight]:
    """Of the values' weight and the gates', in the memory of both."""
    if isinstance(proj, QuantizedLinear):
        return proj.stored.cut(2)
    return [Dense(half) for half in proj.weight.detach().chunk(2)]


def _in_fp8(proj: nn.Linear) -> bool:
    """Whether it multiplies in fp8, for which half of a weight would need a copy of its own."""
    return isinstance(proj, QuantizedLinear) and isinstance(proj.stored, Fp8Matmul)
