"""Linear layers and their LoRA in few products; q, k and v of an attention as one layer.

A LoRA's matrices are small, and three quarters of the products of a step at batch size 1 are theirs. The parameters and
the mathematics are those of peft's layers; only the products are organised otherwise. Sums are computed in place, so
that no tensor of a layer's size is copied or read once more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_lab.base.layers import FrozenWeight, QuantizedLinear, concatenate_weights

ADAPTER = "default"  # peft's name of the adapter in training


@dataclass(frozen=True)
class Projections:
    """K linear layers of one input (B, N, I), each with an output (B, N, O), and J LoRAs for each of them: the first
    B / J samples go through the first LoRA, and so on."""

    frozen: FrozenWeight  # of the weights (K * O, I)
    bias: Tensor | None  # (K * O,)
    down: nn.Parameter  # (J, K * R, I)
    up: nn.Parameter  # (J, K, O, R)
    scale: float | Tensor  # of the LoRAs; (J, 1, 1), float32, where they differ

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, N, I) -> K tensors (B, N, O)."""
        rows = x.reshape(-1, x.shape[-1])
        outputs = _Projected.apply(rows, self.down, self.up, self.scale, self.frozen, self.bias)
        return tuple(out.view(*x.shape[:-1], -1) for out in outputs)


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
            d_rows = ctx.frozen.backward_product(gradient.reshape(-1, count * width))
            _add(d_rows.view(jobs, -1, rows.shape[1]), d_small, down)
        unused = small.new_empty(())  # beta is 0
        d_up = [
            torch.baddbmm(unused, outputs.mT, inputs, beta=0, alpha=ctx.alpha)
            for outputs, inputs in zip(_batches(layers), _batches(small), strict=True)
        ]
        d_up = d_up[0].unsqueeze(0) if jobs == 1 else torch.stack(d_up, 1)
        return d_rows, d_down, d_up, None, None, None


def _scaled(down: Tensor, scale: Tensor) -> Tensor:
    """down (J, K * R, I) times the scales: it has fewer numbers than its products."""
    return (down * scale).to(down.dtype)


def _batches(layers: Tensor) -> Sequence[Tensor]:
    """(J, M, K, X) as batches of matrices: the layers of one LoRA (K, M, X), or for each layer all LoRAs (J, M, X)."""
    return [layers[0].transpose(0, 1)] if len(layers) == 1 else layers.unbind(2)


def _products(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * total + alpha * a b, in place of `total` (J, M, K, X), for K layers of J LoRAs: a is (J, M, K, Y), b is
    (J, K, Y, X)."""
    matrices = [b[0]] if len(b) == 1 else b.unbind(1)
    sums = zip(_batches(total), _batches(a), matrices, strict=True)
    if not torch.compiler.is_compiling():
        for result, left, right in sums:
            result.baddbmm_(left, right, beta=beta, alpha=alpha)
        return total
    parts = [torch.baddbmm(*terms, beta=beta, alpha=alpha) for terms in sums]  # a compiler allocates sums itself
    return parts[0].transpose(0, 1).unsqueeze(0) if len(total) == 1 else torch.stack(parts, 2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a[0], b[0]).unsqueeze(0) if len(a) == 1 else torch.bmm(a, b)


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    if len(total) == 1:
        total[0].addmm_(a[0], b[0])
    else:
        total.baddbmm_(a, b)


class FusedLinear(Linear):
    """peft's layer with its LoRA fused. While another adapter is active, or none, it computes as peft's.

    A subclass, not a new forward on each layer: torch.compile would compile every one of those anew."""

    projections: Projections

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return self.projections(x)[0] if _in_training(self) else super().forward(x)


class FusedAttention:
    """A processor for diffusers' Attention. While another adapter is active, or none, the original processor runs."""

    def __init__(self, groups: tuple[Projections, ...], original: AttnProcessor2_0) -> None:
        self._groups, self._original = groups, original

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **rest,
    ) -> Tensor:
        """hidden_states (B, N, I), encoder_hidden_states (B, M, I') -> (B, N, O)."""
        if not _in_training(attn.to_q) or attention_mask is not None:
            return self._original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **rest)
        if len(self._groups) == 1:
            q, k, v = self._groups[0](hidden_states)
        else:
            (q,), (k, v) = self._groups[0](hidden_states), self._groups[1](encoder_hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended))


class FlatParameters(Protocol):
    """The memory of a network's LoRA parameters, of one LoRA or of J."""

    params: Sequence[nn.Parameter]  # of the network, in the order of their memory

    def as_parameter(self, start: int, shape: tuple[int, ...]) -> nn.Parameter:
        """The numbers of J LoRAs from `start` on, as one parameter (J, *shape)."""


def scale_of(layer: Linear) -> tuple[float, ...]:
    """The scale of a layer's LoRA."""
    return (layer.scaling[ADAPTER],)


def fuse(
    network: nn.Module, flat: FlatParameters, scales: Callable[[Linear], tuple[float, ...]] = scale_of
) -> list[str]:
    """Fuse the linear layers of `network` that have a plain LoRA; returns the names of the layers with an adapter that
    are left to peft. `scales` gives a layer's scales, one per LoRA.

    In `flat` the parameters of q, k and v must be neighbours: all lora_A in the model's order, then all lora_B."""
    offsets, start = {}, 0
    for parameter in flat.params:
        offsets[parameter] = start
        start += parameter.numel()
    plain = {layer: None for layer in network.modules() if isinstance(layer, Linear) and _plain_lora(layer)}
    in_attention: set[Linear] = set()
    for attn in network.modules():
        if not isinstance(attn, Attention) or not _plain_attention(attn):
            continue
        q, k, v = attn.to_q, attn.to_k, attn.to_v
        if not all(layer in plain and layer.base_layer.bias is None for layer in (q, k, v)):
            continue
        inputs = ((q, k, v),) if q.in_features == k.in_features and not attn.is_cross_attention else ((q,), (k, v))
        groups = [_projections(layers, flat, offsets, scales) for layers in inputs]
        if all(groups):
            attn.set_processor(FusedAttention(tuple(groups), attn.processor))
            in_attention |= {q, k, v}
    for layer in plain:
        if layer not in in_attention:
            layer.projections, layer.__class__ = _projections((layer,), flat, offsets, scales), FusedLinear
    adapted = ((name, layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer))
    return [name for name, layer in adapted if layer not in plain]


def _plain_attention(attn: Attention) -> bool:
    """Whether it is attention without what FusedAttention does not compute."""
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
    """Whether a linear layer has a LoRA without dropout, bias or DoRA."""
    return (
        layer.active_adapters == [ADAPTER]
        and type(layer.base_layer) in (nn.Linear, QuantizedLinear)
        and ADAPTER not in layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and layer.lora_B[ADAPTER].bias is None
    )


def _projections(
    layers: Sequence[Linear],
    flat: FlatParameters,
    offsets: dict[nn.Parameter, int],
    scales: Callable[[Linear], tuple[float, ...]],
) -> Projections | None:
    """The layers as one: a single one, or several without bias. None where they differ in size or scale, or their
    parameters are not neighbours."""
    downs = [layer.lora_A[ADAPTER].weight for layer in layers]
    ups = [layer.lora_B[ADAPTER].weight for layer in layers]
    kinds = {(scales(x), d.shape, u.shape) for x, d, u in zip(layers, downs, ups, strict=True)}
    if len(kinds) > 1 or not (_neighbours(downs, offsets) and _neighbours(ups, offsets)):
        return None
    frozen = concatenate_weights([layer.base_layer for layer in layers])
    if frozen is None:
        return None
    count, (width, rank) = len(layers), ups[0].shape
    down = flat.as_parameter(offsets[downs[0]], (count * rank, downs[0].shape[1]))
    up = flat.as_parameter(offsets[ups[0]], (count, width, rank))
    values = scales(layers[0])
    scale = values[0] if len(set(values)) == 1 else torch.tensor(values, device=down.device).view(-1, 1, 1)
    return Projections(frozen, layers[0].base_layer.bias, down, up, scale)


def _neighbours(parameters: list[nn.Parameter], offsets: dict[nn.Parameter, int]) -> bool:
    ends = [offsets[p] + p.numel() for p in parameters[:-1]]
    return ends == [offsets[p] for p in parameters[1:]]
