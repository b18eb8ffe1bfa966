"""Attention with its LoRA in few products: q, k and v as one with the frozen weights and one with the learnt ones.

A LoRA's matrices are small, and three quarters of a step's products at batch 1 are theirs. The mathematics is that of
peft's layers, whose parameters these are: only who multiplies them is changed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lora_lab.base.stored import StoredLinear, joined
from lora_lab.training.flat import Flat

ADAPTER = "default"  # peft's name of the adapter in training


@dataclass(frozen=True)
class Projections:
    """K linear layers on one input (B, N, I): each gives (B, N, O)."""

    frozen: Callable[[Tensor], Tensor]  # (N, I) -> (N, K * O)
    down: nn.Parameter  # (K * R, I)
    up: nn.Parameter  # (K, O, R)
    scale: float  # of the LoRA

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        count, width, rank = self.up.shape
        rows = x.reshape(-1, x.shape[-1])
        out = self.frozen(rows).view(len(rows), count, width).transpose(0, 1)
        small = F.linear(rows, self.down).view(len(rows), count, rank).transpose(0, 1)
        out = torch.baddbmm(out, small, self.up.transpose(1, 2), alpha=self.scale)
        return out.view(count, *x.shape[:-1], width).unbind()


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
        if attn.to_q.disable_adapters or attn.to_q.active_adapters != [ADAPTER] or attention_mask is not None:
            return self._before(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **rest)
        if len(self._groups) == 1:
            q, k, v = self._groups[0](hidden_states)
        else:
            (q,), (k, v) = self._groups[0](hidden_states), self._groups[1](encoder_hidden_states)
        q, k, v = (each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](seen))


def fuse(unet: UNet2DConditionModel, learnt: Flat) -> int:
    """Put FusedAttention where the attention's LoRA allows it; returns into how many.

    In `learnt` the parameters of q, k and v must be neighbours: all lora_A in the model's order, then all lora_B."""
    offsets, start = {}, 0
    for parameter in learnt.parameters:
        offsets[parameter] = start
        start += parameter.numel()
    fused = 0
    for attn in unet.modules():
        if not isinstance(attn, Attention) or not _plain(attn):
            continue
        q, k, v = attn.to_q, attn.to_k, attn.to_v
        if not all(_plain_lora(layer) for layer in (q, k, v)):
            continue
        together = ((q, k, v),) if q.in_features == k.in_features and not attn.is_cross_attention else ((q,), (k, v))
        groups = [_projections(layers, learnt, offsets) for layers in together]
        if all(groups):
            attn.set_processor(FusedAttention(tuple(groups), attn.processor))
            fused += 1
    return fused


def _plain(attn: Attention) -> bool:
    """Whether it is attention as SDXL has it, without what only other models use."""
    unused = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    return (
        type(attn.processor) is AttnProcessor2_0
        and not any(unused)
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
    )


def _plain_lora(layer: nn.Module) -> bool:
    """Whether a linear layer without bias wears a LoRA, and nothing more than that."""
    return (
        isinstance(layer, Linear)
        and layer.active_adapters == [ADAPTER]
        and type(layer.base_layer) in (nn.Linear, StoredLinear)
        and layer.base_layer.bias is None
        and ADAPTER not in layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and layer.lora_B[ADAPTER].bias is None
    )


def _projections(layers: tuple[Linear, ...], learnt: Flat, offsets: dict[nn.Parameter, int]) -> Projections | None:
    """The layers as one; None where they differ in size or scale, or are no neighbours."""
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
    return Projections(frozen, down, learnt.leaf(offsets[ups[0]], (count, width, rank)), layers[0].scaling[ADAPTER])


def _neighbours(parameters: list[nn.Parameter], offsets: dict[nn.Parameter, int]) -> bool:
    ends = [offsets[p] + p.numel() for p in parameters[:-1]]
    return ends == [offsets[p] for p in parameters[1:]]
