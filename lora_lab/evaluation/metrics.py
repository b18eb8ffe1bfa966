"""How good a LoRA is, read from its pictures: formulas on unit embeddings and on text (docs/scores.md)."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

LOWER_IS_BETTER = ("leakage", "memorised")
UNDIRECTED = ("diversity",)  # neither: of a character that is well learnt less changes than of none; of all others more
RESAMPLES = 1000  # of the bootstrap; its seed is fixed, so that the same pictures give the same interval


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures, and between which two numbers 95 of 100 resamplings of these pictures have it."""

    value: float
    low: float
    high: float


Scores = dict[str, Estimate | None]


@dataclass(frozen=True)
class Scale:
    """What the measures are of the base and of the references: where nothing and where all that can be is reached."""

    parts_before: float  # of the base's pictures of the same prompts, and so on
    parts_alike: float  # of the references among each other
    contrast_before: float
    attributes_before: float  # nan where nothing is asked of the captioner
    contrast_others_before: float


def subject(pictures: Tensor, references: Tensor) -> Tensor:
    """Subject fidelity (N,): of each picture the mean cosine to the references (Ruiz et al. 2022, DINO and CLIP-I).

    pictures (N, D) and references (M, D) are unit vectors."""
    return (pictures @ references.T).mean(dim=1)


def parts(pictures: Tensor, references: Tensor) -> Tensor:
    """How much of the reference most like it is found in each picture (N,): of every part of a reference the best
    cosine to a part of the picture, and their mean; of the references the best one (late interaction: Khattab and
    Zaharia 2020, on patches Yao et al. 2021).

    pictures (N, T, D) and references (M, T, D) are vectors of parts, of any length. Each channel is measured by what it
    is in the references, since some are large in every picture (Sun et al. 2024)."""
    return _found(pictures, references).amax(dim=1)


def alike(references: Tensor) -> float:
    """How much of another reference is found in one, of references (M, T, D) as `parts` has it; 1 where there is only
    one."""
    found = _found(references, references).fill_diagonal_(-1)
    return 1.0 if len(references) < 2 else found.amax(dim=1).mean().item()


def _found(pictures: Tensor, references: Tensor) -> Tensor:
    """How much of each reference is found in each picture (N, M)."""
    deviation, mean = torch.std_mean(references, dim=(0, 1), correction=0)
    pictures, references = (normalize((each - mean) / (deviation + 1e-5), dim=-1) for each in (pictures, references))
    return torch.stack([(pictures @ each.T).amax(dim=1).mean(dim=1) for each in references], dim=1)


def prompt(pictures: Tensor, texts: Tensor, asked: Sequence[int]) -> Tensor:
    """Prompt fidelity (N,): the cosine of picture i and text asked[i] (CLIP-T; Hessel et al. 2021, CLIPScore).

    pictures (N, D) and texts (T, D) are unit vectors."""
    return (pictures * texts[list(asked)]).sum(dim=1)


def contrast(pictures: Tensor, texts: Tensor, asked: Sequence[int]) -> Tensor:
    """How much better a picture fits its text than the other texts (N,): its cosine less their mean cosine.

    What every picture has in common with every text falls out: a subject that CLIP does not know, or its own scale."""
    cosines = pictures @ texts.T
    own = cosines.gather(1, torch.tensor(list(asked))[:, None])[:, 0]
    return own - (cosines.sum(dim=1) - own) / max(texts.shape[0] - 1, 1)


def leakage(pictures: Tensor, before: Tensor) -> Tensor:
    """How far pictures of prompts without the trigger moved (M,): one less the cosine to the base's picture of the same
    prompt and seed. Both are unit vectors (M, D)."""
    return 1 - (pictures * before).sum(dim=1)


def diversity(pictures: Tensor, asked: Sequence[int]) -> Tensor:
    """How much the seed changes (N,): of each picture the mean of one less the cosine to those of its prompt under
    other seeds; nan where there is none (Ruiz et al. 2022, DIV, with an embedding in LPIPS's place)."""
    groups = torch.tensor(list(asked))
    same = (groups[:, None] == groups[None]) & ~torch.eye(len(groups), dtype=torch.bool)
    return ((1 - pictures @ pictures.T) * same).sum(dim=1) / same.sum(dim=1)  # 0 / 0 is nan


def memorised(pictures: Tensor, training: Tensor) -> Tensor:
    """Whether a picture is the copy of a single training picture (N,), 0 or 1: it is nearer to that one than any other
    training picture is (Alaa et al. 2022, authenticity). pictures (N, D) and training (M, D) are unit vectors; with
    one training picture nothing can be said, nan."""
    if len(training) < 2:
        return torch.full((len(pictures),), torch.nan)
    cosine, nearest = (pictures @ training.T).max(dim=1)
    among = (training @ training.T).fill_diagonal_(-1).amax(dim=1)
    return (cosine > among[nearest]).float()


def attributes(asked: str, caption: str, patterns: Sequence[re.Pattern]) -> list[bool]:
    """Whether the caption has what the prompt asked for, one for each of `patterns` that occurs in the prompt: it must
    occur in the caption too, and if it has groups, with the same words in them.

    >>> patterns = [re.compile(r"(\\w+) background"), re.compile("bicycle|bike"), re.compile("hat")]
    >>> attributes("a cat on a bicycle with a red background", "a bike, with a blue background", patterns)
    [False, True]
    """
    read = []
    for pattern in patterns:
        if found := pattern.search(asked.casefold()):
            read.append(any(other.groups() == found.groups() for other in pattern.finditer(caption.casefold())))
    return read


def combined(gained: Tensor, contrast: Tensor, attributes: Tensor, contrast_others: Tensor, scale: Scale) -> Tensor:
    """The one number, of numbers of any one shape: (learnt followed)^(1/2), between 0 and 1.

    learnt: what `parts` gained over the base, as a share of what the references have over it among each other.
    followed: the mean of contrast, attributes and contrast_others, each from 0 to the base's; without attributes that
    are nan.
    So it is 0 for a LoRA that learnt nothing and for one that follows nothing."""
    learnt = _share(gained, scale.parts_alike - scale.parts_before)
    shares = [
        _share(contrast, scale.contrast_before),
        _share(attributes, scale.attributes_before),
        _share(contrast_others, scale.contrast_others_before),
    ]
    return (learnt * torch.stack(shares).nanmean(dim=0)).sqrt()


def estimates(
    groups: Sequence[Mapping[str, Tensor]], together: Callable[[Mapping[str, Tensor]], Tensor]
) -> dict[str, Estimate | None]:
    """Of every measure the mean and its bootstrap interval (Efron 1979, percentiles), and first, as score, of what
    `together` makes of the means.

    A group has its measures' numbers (N,) of the same pictures, which are drawn together, with replacement. A number
    that is nan is left out; a measure of nothing else is None."""
    generator = torch.Generator().manual_seed(0)
    means, resampled = {}, {}
    for group in groups:
        count = len(next(iter(group.values())))
        index = torch.randint(count, (RESAMPLES, count), generator=generator)
        for name, numbers in group.items():
            means[name] = numbers.double().nanmean()
            resampled[name] = numbers.double()[index].nanmean(dim=1)
    means = {"score": together(means), **means}
    resampled = {"score": together(resampled), **resampled}
    return {name: _estimate(mean, resampled[name]) for name, mean in means.items()}


def _estimate(mean: Tensor, resampled: Tensor) -> Estimate | None:
    if mean.isnan():
        return None
    low, high = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype))
    return Estimate(*(round(number.item(), 4) for number in (mean, low, high)))


def _share(part: Tensor, whole: float) -> Tensor:
    """Between 0 and 1; where there is nothing to be had, 0."""
    return (part / whole).clamp(0, 1) if whole > 0 or math.isnan(whole) else torch.zeros_like(part)
