"""Linear layers with their LoRA in few products; q, k and v of an attention as one layer.

A LoRA's matrices are small, and three quarters of a step's products at batch 1 are theirs. The mathematics is that of
peft's layers, whose parameters these are: only who multiplies them is changed. Sums are made where they lie, so that
nothing of a layer's size is copied or read once more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_lab.base.quantize import FrozenWeight, QuantizedLinear, joined

ADAPTER = "default"  # peft's name of the adapter in training


@dataclass(frozen=True)
class Projections:
    """K linear layers on one input (B, N, I), each giving (B, N, O), with the LoRAs of J jobs: the first B / J samples
    meet those of the first, and so on."""

    frozen: FrozenWeight  # of the weights (K * O, I)
    bias: Tensor | None  # (K * O,)
    down: nn.Parameter  # (J, K * R, I)
    up: nn.Parameter  # (J, K, O, R)
    scale: float | Tensor  # of the LoRAs; (J, 1, 1), float32, where they differ

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        each = _Projected.apply(rows, self.down, self.up, self.scale, self.frozen, self.bias)
        return tuple(out.view(*x.shape[:-1], -1) for out in each)


class _Projected(torch.autograd.Function):
    """rows (J * M, I) -> K times (J * M, O): rows W.T + bias + scale * rows down.T up.T."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, down: Tensor, up: Tensor, scale: float | Tensor, frozen: FrozenWeight, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        jobs, count, width, rank = up.shape
        down, alpha = (_scaled(down, scale), 1.0) if isinstance(scale, Tensor) else (down, scale)
        small = _product(rows.view(jobs, -1, rows.shape[1]), down.mT)
        out = frozen.product(rows, bias).view(jobs, -1, count, width)
        out = _products(out, small.view(jobs, -1, count, rank), up.mT, 1, alpha)
        ctx.save_for_backward(rows, small, down, up)
        ctx.scale, ctx.alpha, ctx.frozen = scale, alpha, frozen
        return out.flatten(0, 1).unbind(1)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, small, down, up = ctx.saved_tensors
        jobs, count, width, rank = up.shape
        gradient = torch.stack(gradients, 1) if count > 1 else gradients[0].unsqueeze(1)
        layers, small = gradient.view(jobs, -1, count, width), small.view(jobs, -1, count, rank)
        d_small = _products(torch.empty_like(small), layers, up, 0, ctx.alpha).reshape(jobs, -1, count * rank)
        d_down = _product(d_small.mT, rows.view(jobs, -1, rows.shape[1]))
        d_down = _scaled(d_down, ctx.scale) if isinstance(ctx.scale, Tensor) else d_down
        d_rows = None
        if ctx.needs_input_grad[0]:
            d_rows = ctx.frozen.back(gradient.reshape(-1, count * width))
            _add(d_rows.view(jobs, -1, rows.shape[1]), d_small, down)
        nothing = small.new_empty(())
        d_up = [
            torch.baddbmm(nothing, of.mT, by, beta=0, alpha=ctx.alpha)
            for of, by in zip(_each(layers), _each(small), strict=True)
        ]
        d_up = d_up[0].unsqueeze(0) if jobs == 1 else torch.stack(d_up, 1)
        return d_rows, d_down, d_up, None, None, None


def _scaled(down: Tensor, scale: Tensor) -> Tensor:
    """The matrices are few numbers beside what they meet."""
    return (down * scale).to(down.dtype)


def _each(layers: Tensor) -> Sequence[Tensor]:
    """(J, M, K, X) as a few times many matrices: one job's layers (K, M, X), or each layer's jobs (J, M, X)."""
    return [layers[0].transpose(0, 1)] if len(layers) == 1 else layers.unbind(2)


def _products(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * total + alpha * a b where `total` lies, for K layers of J jobs: (J, M, K, X), (J, M, K, Y) and
    (J, K, Y, X)."""
    matrices = [b[0]] if len(b) == 1 else b.unbind(1)
    sums = zip(_each(total), _each(a), matrices, strict=True)
    if not torch.compiler.is_compiling():
        for its, left, right in sums:
            its.baddbmm_(left, right, beta=beta, alpha=alpha)
        return total
    parts = [torch.baddbmm(*each, beta=beta, alpha=alpha) for each in sums]  # a compiler gives sums places of its own
    return parts[0].transpose(0, 1).unsqueeze(0) if len(total) == 1 else torch.stack(parts, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a[0], b[0]).unsqueeze(0) if len(a) == 1 else torch.bmm(a, b)


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    if len(total) == 1:
        total[0].addmm_(a[0], b[0])
    else:
        total.baddbmm_(a, b)


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


class Learnt(Protocol):
    """Where the numbers of a UNet's LoRA lie, of one job or of several."""

    params: Sequence[nn.Parameter]  # of the UNet, in the order in which they lie

    def as_parameter(self, start: int, shape: tuple[int, ...]) -> nn.Parameter:
        """The numbers of J jobs from `start` on, as one parameter (J, *shape)."""


def scale_of(layer: Linear) -> tuple[float, ...]:
    return (layer.scaling[ADAPTER],)


def fuse(
    unet: UNet2DConditionModel, learnt: Learnt, scales: Callable[[Linear], tuple[float, ...]] = scale_of
) -> list[str]:
    """Let the linear layers of `unet` that wear a LoRA and nothing more compute it as above; returns the names of the
    layers with an adapter that are left to peft. `scales` are those of a layer's LoRA in every job.

    In `learnt` the parameters of q, k and v must be neighbours: all lora_A in the model's order, then all lora_B."""
    offsets, start = {}, 0
    for parameter in learnt.params:
        offsets[parameter] = start
        start += parameter.numel()
    in_attention, alone = (
        [],
        {layer: None for layer in unet.modules() if isinstance(layer, Linear) and _plain_lora(layer)},
    )
    for attn in unet.modules():
        if not isinstance(attn, Attention) or not _plain(attn):
            continue
        q, k, v = attn.to_q, attn.to_k, attn.to_v
        if not all(layer in alone and layer.base_layer.bias is None for layer in (q, k, v)):
            continue
        together = ((q, k, v),) if q.in_features == k.in_features and not attn.is_cross_attention else ((q,), (k, v))
        groups = [_projections(layers, learnt, offsets, scales) for layers in together]
        if all(groups):
            attn.set_processor(FusedAttention(tuple(groups), attn.processor))
            in_attention.append((q, k, v))
            for layer in (q, k, v):
                del alone[layer]
    for layer in alone:
        layer.alone, layer.__class__ = _projections((layer,), learnt, offsets, scales), FusedLinear
    adapted = ((name, layer) for name, layer in unet.named_modules() if isinstance(layer, BaseTunerLayer))
    fused = {layer for group in in_attention for layer in group} | alone.keys()
    return [name for name, layer in adapted if layer not in fused]


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
        and type(layer.base_layer) in (nn.Linear, QuantizedLinear)
        and ADAPTER not in layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and layer.lora_B[ADAPTER].bias is None
    )


def _projections(
    layers: Sequence[Linear],
    learnt: Learnt,
    offsets: dict[nn.Parameter, int],
    scales: Callable[[Linear], tuple[float, ...]],
) -> Projections | None:
    """The layers as one: a single one, or several without bias. None where they differ in size or scale, or are no
    neighbours."""
    downs = [layer.lora_A[ADAPTER].weight for layer in layers]
    ups = [layer.lora_B[ADAPTER].weight for layer in layers]
    alike = {(scales(x), d.shape, u.shape) for x, d, u in zip(layers, downs, ups, strict=True)}
    if len(alike) > 1 or not (_neighbours(downs, offsets) and _neighbours(ups, offsets)):
        return None
    frozen = joined([layer.base_layer for layer in layers])
    if frozen is None:
        return None
    count, (width, rank) = len(layers), ups[0].shape
    down = learnt.as_parameter(offsets[downs[0]], (count * rank, downs[0].shape[1]))
    up = learnt.as_parameter(offsets[ups[0]], (count, width, rank))
    its = scales(layers[0])
    scale = its[0] if len(set(its)) == 1 else torch.tensor(its, device=down.device).view(-1, 1, 1)
    return Projections(frozen, layers[0].base_layer.bias, down, up, scale)


def _neighbours(parameters: list[nn.Parameter], offsets: dict[nn.Parameter, int]) -> bool:
    ends = [offsets[p] + p.numel() for p in parameters[:-1]]
    return ends == [offsets[p] for p in parameters[1:]]
