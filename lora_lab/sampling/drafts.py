"""Weights of the LoRA and strengths that are tried for a photo, and the choice among their drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Factors of weight and strength, the more often chosen first (docs/resemblance.md).
FACTORS = ((1.0, 1.0), (1.0, 0.8), (0.8, 1.0), (1.15, 1.0), (1.0, 0.9), (0.9, 0.8))
SAME = 0.95  # of drafts with a mean cosine of their parts above it one is left


@dataclass(frozen=True)
class Variant:
    """How one draft is drawn over a photo."""

    lora_weight: float
    strength: float


def variants(
    lora_weight: float | None, strength: float | None, default: float, budget: int, steps: int
) -> list[Variant]:
    """At most `budget` variants, the usual one first. What is given stays; else the weight is near 1, and the strength
    at most `default`. Of strengths that begin at the same of the draft's `steps` one is left."""
    found: dict[tuple[float, int], Variant] = {}
    for factor, share in FACTORS:
        weight = factor if lora_weight is None else lora_weight
        variant = Variant(weight, round(default * share, 4) if strength is None else strength)
        begins = int(steps * variant.strength)
        if begins:  # else no step is left
            found.setdefault((weight, begins), variant)
    return [*found.values()][:budget]


def best_drafts(scores: Sequence[float], parts: Tensor, count: int) -> list[int]:
    """The indices of the `count` drafts with the highest scores, the best first, without those that look like a better
    one; these follow where there are not enough others. parts (N, T, D) are unit vectors."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    different: list[int] = []
    for i in ranked:
        alike = [(parts[i] * parts[j]).sum(dim=-1).mean() for j in different]
        if not alike or torch.stack(alike).max() < SAME:
            different.append(i)
    return [*different, *(i for i in ranked if i not in different)][:count]
