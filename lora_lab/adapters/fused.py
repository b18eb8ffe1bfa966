"""Linear layers with their LoRA in few products; q, k and v of an attention as one layer.

A LoRA's matrices are small, and three quarters of a step's products at batch 1 are theirs. The mathematics is that of
peft's layers, whose parameters these are: only who multiplies them is changed. Sums are made where they lie, so that
nothing of a layer's size is copied or read once more."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lora_lab.base.stored import Stored, StoredLinear, joined
from lora_lab.training.flat import Flat

ADAPTER = "default"  # peft's name of the adapter in training


@dataclass(frozen=True)
class Projections:
    """K linear layers with their LoRA on one input (B, N, I): each gives (B, N, O)."""

    frozen: Stored  # of the weights (K * O, I)
    bias: Tensor | None  # (K * O,)
    down: nn.Parameter  # (K * R, I)
    up: nn.Parameter  # (K, O, R)
    scale: float  # of the LoRA

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        each = _Projected.apply(rows, self.down, self.up, self.scale, self.frozen, self.bias)
        return tuple(out.view(*x.shape[:-1], -1) for out in each)


class _Projected(torch.autograd.Function):
    """rows (N, I) -> K times (N, O): rows W.T + bias + scale * rows down.T up.T."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, down: Tensor, up: Tensor, scale: float, frozen: Stored, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        count, width, rank = up.shape
        small = F.linear(rows, down)
        out = frozen.product(rows, bias).view(-1, count, width).transpose(0, 1)
        ctx.save_for_backward(rows, small, down, up)
        ctx.scale, ctx.frozen = scale, frozen
        return _add(out, small.view(-1, count, rank).transpose(0, 1), up.transpose(1, 2), 1, scale).unbind()

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, small, down, up = ctx.saved_tensors
        count, width, rank = up.shape
        gradient = torch.stack(gradients, 1) if count > 1 else gradients[0].unsqueeze(1)  # (N, K, O)
        layers, small = gradient.transpose(0, 1), small.view(-1, count, rank).transpose(0, 1)
        d_small = _add(torch.empty_like(small), layers, up, 0, ctx.scale).transpose(0, 1).reshape(-1, count * rank)
        d_rows = None
        if ctx.needs_input_grad[0]:
            d_rows = ctx.frozen.back(gradient.reshape(-1, count * width)).addmm_(d_small, down)
        d_up = _add(torch.empty_like(up), layers.transpose(1, 2), small, 0, ctx.scale)
        return d_rows, d_small.t() @ rows, d_up, None, None, None


def _add(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * total + alpha * a b for K matrices, where `total` lies."""
    if torch.compiler.is_compiling():  # it gives its sums places of its own
        return torch.baddbmm(total, a, b, beta=beta, alpha=alpha)
    return total.baddbmm_(a, b, beta=beta, alpha=alpha)


class FusedLinear(Linear):
    """What one of peft's layers becomes. While another adapter is worn, or none, it is what it was.

    Another class, and not another function on each layer: torch.compile would compile every one of those anew."""

    alone: Projections

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(x)[0] if _in_training(self) else super().forward(x)


class FusedAttention:
    """A processor for diffusers' Attention. While another adapter is worn, or none, it leaves all to the one before."""

    def __init__(self, groups: tuple[Projections, ...], before: AttnProcessor2_0) -> None:
        self._groups, self._before = groups, before

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **rest,
    ) -> Tensor:
        if not _in_training(attn.to_q) or attention_mask is not None:
            return self._before(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **rest)
        if len(self._groups) == 1:
            q, k, v = self._groups[0](hidden_states)
        else:
            (q,), (k, v) = self._groups[0](hidden_states), self._groups[1](encoder_hidden_states)
        q, k, v = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](seen))


def fuse(unet: UNet2DConditionModel, learnt: Flat) -> None:
    """Let the linear layers of `unet` that wear a LoRA and nothing more compute it as above.

    In `learnt` the parameters of q, k and v must be neighbours: all lora_A in the model's order, then all lora_B."""
    offsets, start = {}, 0
    for parameter in learnt.parameters:
        offsets[parameter] = start
        start += parameter.numel()
    alone = {layer: None for layer in unet.modules() if isinstance(layer, Linear) and _plain_lora(layer)}
    for attn in unet.modules():
        if not isinstance(attn, Attention) or not _plain(attn):
            continue
        q, k, v = attn.to_q, attn.to_k, attn.to_v
        if not all(layer in alone and layer.base_layer.bias is None for layer in (q, k, v)):
            continue
        together = ((q, k, v),) if q.in_features == k.in_features and not attn.is_cross_attention else ((q,), (k, v))
        groups = [_projections(layers, learnt, offsets) for layers in together]
        if all(groups):
            attn.set_processor(FusedAttention(tuple(groups), attn.processor))
            for layer in (q, k, v):
                del alone[layer]
    for layer in alone:
        layer.alone, layer.__class__ = _projections((layer,), learnt, offsets), FusedLinear


def _plain(attn: Attention) -> bool:
    """Whether it is attention as SDXL has it, without what only other models use."""
    unused = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    return (
        type(attn.processor) is AttnProcessor2_0
        and not any(unused)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )


def _in_training(layer: Linear) -> bool:
    return not layer.disable_adapters and layer.active_adapters == [ADAPTER]


def _plain_lora(layer: Linear) -> bool:
    """Whether a linear layer wears a LoRA, and nothing more than that."""
    return (
        layer.active_adapters == [ADAPTER]
        and type(layer.base_layer) in (nn.Linear, StoredLinear)
        and ADAPTER not in layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and layer.lora_B[ADAPTER].bias is None
    )


def _projections(layers: Sequence[Linear], learnt: Flat, offsets: dict[nn.Parameter, int]) -> Projections | None:
    """The layers as one: a single one, or several without bias. None where they differ in size or scale, or are no
    neighbours."""
    downs = [layer.lora_A[ADAPTER].weight for layer in layers]
    ups = [layer.lora_B[ADAPTER].weight for layer in layers]
    alike = {(x.scaling[ADAPTER], d.shape, u.shape) for x, d, u in zip(layers, downs, ups, strict=True)}
    if len(alike) > 1 or not (_neighbours(downs, offsets) and _neighbours(ups, offsets)):
        return None
    frozen = joined([layer.base_layer for layer in layers])
    if frozen is None:
        return None
    count, (width, rank) = len(layers), ups[0].shape
    down = learnt.leaf(offsets[downs[0]], (count * rank, downs[0].shape[1]))
    up = learnt.leaf(offsets[ups[0]], (count, width, rank))
    return Projections(frozen, layers[0].base_layer.bias, down, up, layers[0].scaling[ADAPTER])


def _neighbours(parameters: list[nn.Parameter], offsets: dict[nn.Parameter, int]) -> bool:
    ends = [offsets[p] + p.numel() for p in parameters[:-1]]
    return ends == [offsets[p] for p in parameters[1:]]
