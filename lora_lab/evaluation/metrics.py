"""The metrics of a LoRA's images: formulas on unit embeddings and on text (docs/scores.md)."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

RESAMPLES = 1000  # of the bootstrap; its seed is fixed, so that the same images give the same interval


@dataclass(frozen=True)
class Estimate:
    """A mean over images, and the interval that contains the means of 95 of 100 resamplings of these images."""

    value: float
    low: float
    high: float


Scores = dict[str, Estimate | None]


@dataclass(frozen=True)
class Scale:
    """The metrics of the images that the base draws of the same prompts without a LoRA: 1 of the scale."""

    contrast_before: float
    attributes_before: float  # nan where the scores need no captions
    contrast_others_before: float


def subject(pictures: Tensor, references: Tensor) -> Tensor:
    """Subject fidelity (N,): each image's mean cosine to the references (Ruiz et al. 2022, DINO and CLIP-I).

    pictures (N, D) and references (M, D) are unit vectors."""
    return (pictures @ references.T).mean(dim=1)


@dataclass(frozen=True)
class DistinctiveParts:
    """The parts of M references, T vectors (D,) each, weighted by what tells the character from other images: how much
    better other references than the base's images match the part.

    Matching each part with its best counterpart is late interaction (Khattab and Zaharia 2020, on patches Yao et al.
    2021). Each channel is standardised over references and base images, since some channels are large in every image
    (Sun et al. 2024)."""

    mean: Tensor  # (D,)
    deviation: Tensor  # (D,)
    references: Tensor  # (M, T, D), standardised unit vectors
    before: Tensor  # (M, T), the mean cosine of each part's best counterparts in the base's images
    weights: Tensor  # (M, T), so scaled that a reference has found 1 of the others, on average

    @classmethod
    def of(cls, references: Tensor, before: Tensor) -> "DistinctiveParts":
        """For references (M, T, D) and images of the base (K, T, D), vectors of parts of any length."""
        deviation, mean = torch.std_mean(torch.cat([references, before]), dim=(0, 1), correction=0)
        references, before = (normalize((x - mean) / (deviation + 1e-5), dim=-1) for x in (references, before))
        among = best_cosines(references, references)
        own = torch.eye(len(references), dtype=torch.bool, device=references.device)
        alike = among.masked_fill(own[:, None], torch.nan).nanmean(dim=2) if len(references) > 1 else among[..., 0]
        base = best_cosines(references, before).mean(dim=2)
        gain = (alike - base).clamp(min=0)
        return cls(mean, deviation, references, base, gain / gain.square().sum().clamp(min=1e-9))

    def found(self, images: Tensor) -> Tensor:
        """How much of the character each of images (N, T, D) contains (N,): 0 as the base's images on average, 1 as
        the references among each other, below 0 for what resembles nothing that either shows."""
        images = normalize((images - self.mean) / (self.deviation + 1e-5), dim=-1)
        gained = best_cosines(self.references, images) - self.before[..., None]
        return (gained * self.weights[..., None]).sum(dim=(0, 1))


def best_cosines(references: Tensor, images: Tensor) -> Tensor:
    """For every part of references (M, T, D) the cosine of its best counterpart in each of images (N, T, D): (M, T, N).

    All are unit vectors."""
    return torch.stack([(reference @ images.mT).amax(dim=2).mT for reference in references])


def prompt(pictures: Tensor, texts: Tensor, indices: Sequence[int]) -> Tensor:
    """Prompt fidelity (N,): the cosine of image i and text indices[i] (CLIP-T; Hessel et al. 2021, CLIPScore).

    pictures (N, D) and texts (T, D) are unit vectors."""
    return (pictures * texts[list(indices)]).sum(dim=1)


def contrast(pictures: Tensor, texts: Tensor, indices: Sequence[int]) -> Tensor:
    """How much better image i fits text indices[i] than the other texts (N,): its cosine minus their mean cosine.

    What every image has in common with every text cancels: a subject that CLIP does not know, or CLIP's scale.
    pictures (N, D) and texts (T, D) are unit vectors."""
    cosines = pictures @ texts.T
    matching = cosines.gather(1, torch.tensor(list(indices))[:, None])[:, 0]
    return matching - (cosines.sum(dim=1) - matching) / max(texts.shape[0] - 1, 1)


def leakage(pictures: Tensor, before: Tensor) -> Tensor:
    """How far images of prompts without the trigger moved (M,): 1 minus the cosine to the base's image of the same
    prompt and seed. Both are unit vectors (M, D)."""
    return 1 - (pictures * before).sum(dim=1)


def diversity(pictures: Tensor, prompts: Sequence[int]) -> Tensor:
    """How much the seed changes (N,): for each image the mean of 1 minus the cosine to those of its prompt with other
    seeds; nan where there is none (Ruiz et al. 2022, DIV, with an embedding in place of LPIPS).

    pictures (N, D) are unit vectors, `prompts` gives the prompt of each."""
    groups = torch.tensor(list(prompts))
    same = (groups[:, None] == groups[None]) & ~torch.eye(len(groups), dtype=torch.bool)
    return ((1 - pictures @ pictures.T) * same).sum(dim=1) / same.sum(dim=1)  # 0 / 0 is nan


def memorised(pictures: Tensor, training: Tensor) -> Tensor:
    """Whether an image copies a single training image (N,), 0 or 1: it is nearer to that one than any other training
    image is (Alaa et al. 2022, authenticity); nan with a single training image. pictures (N, D) and training (M, D) are
    unit vectors."""
    if len(training) < 2:
        return torch.full((len(pictures),), torch.nan)
    cosine, nearest = (pictures @ training.T).max(dim=1)
    spacing = (training @ training.T).fill_diagonal_(-1).amax(dim=1)
    return (cosine > spacing[nearest]).float()


def attributes(prompt: str, caption: str, patterns: Sequence[re.Pattern]) -> list[bool]:
    """Whether the caption names the prompt's attributes, one value for each of `patterns` that occurs in the prompt: it
    must occur in the caption too, and if it has groups, with the same words in them.

    >>> patterns = [re.compile(r"(\\w+) background"), re.compile("bicycle|bike"), re.compile("hat")]
    >>> attributes("a cat on a bicycle with a red background", "a bike, with a blue background", patterns)
    [False, True]
    """
    named = []
    for pattern in patterns:
        if match := pattern.search(prompt.casefold()):
            named.append(any(other.groups() == match.groups() for other in pattern.finditer(caption.casefold())))
    return named


def combined(parts: Tensor, contrast: Tensor, attributes: Tensor, contrast_others: Tensor, scale: Scale) -> Tensor:
    """The score, of numbers of any one shape, and of that shape: sqrt(learnt * followed), between 0 and 1.

    learnt: `parts` (DistinctiveParts.found), between 0 and 1.
    followed: the mean of contrast, attributes and contrast_others, each as a fraction of the base's; attributes are
    left out where they are nan.
    So it is 0 for a LoRA that learnt nothing and for one that follows no prompt."""
    fractions = [
        _fraction(contrast, scale.contrast_before),
        _fraction(attributes, scale.attributes_before),
        _fraction(contrast_others, scale.contrast_others_before),
    ]
    return (parts.clamp(0, 1) * torch.stack(fractions).nanmean(dim=0)).sqrt()


def estimates(
    groups: Sequence[Mapping[str, Tensor]], combine: Callable[[Mapping[str, Tensor]], Tensor]
) -> dict[str, Estimate | None]:
    """The mean of every metric with its bootstrap interval (Efron 1979, percentiles), and first, as score, the same for
    `combine` of the means.

    A group has numbers (N,) of the same images by metric; images are resampled per group, with replacement. nan is left
    out; a metric that is nan for all images is None."""
    generator = torch.Generator().manual_seed(0)
    means, resampled = {}, {}
    for group in groups:
        count = len(next(iter(group.values())))
        index = torch.randint(count, (RESAMPLES, count), generator=generator)
        for name, numbers in group.items():
            means[name] = numbers.double().nanmean()
            resampled[name] = numbers.double()[index].nanmean(dim=1)
    means = {"score": combine(means), **means}
    resampled = {"score": combine(resampled), **resampled}
    return {name: _estimate(mean, resampled[name]) for name, mean in means.items()}


def mean_estimate(parts: Sequence[Estimate | None]) -> Estimate | None:
    """The mean of estimates from different images, and its interval; None where all of them are."""
    known = [part for part in parts if part]
    if not known:
        return None
    value = sum(part.value for part in known) / len(known)
    down, up = (
        math.hypot(*(getattr(part, end) - part.value for part in known)) / len(known) for end in ("low", "high")
    )
    return Estimate(round(value, 4), round(value - down, 4), round(value + up, 4))


def _estimate(mean: Tensor, resampled: Tensor) -> Estimate | None:
    if mean.isnan():
        return None
    low, high = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype))
    return Estimate(*(round(number.item(), 4) for number in (mean, low, high)))


def _fraction(part: Tensor, whole: float) -> Tensor:
    """part / whole, clamped to [0, 1]; 0 where `whole` is not positive."""
    return (part / whole).clamp(0, 1) if whole > 0 or math.isnan(whole) else torch.zeros_like(part)
