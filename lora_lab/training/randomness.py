"""Randomness that is counted, not consumed: every draw is a function of (seed, step, sample).

Nothing has to be saved to go on with a run, and neither batch companions nor the number of processes change a draw."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lora_lab.settings.schema import Loss


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on the whole key: near keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator, so that a draw is the same on every device."""
    return torch.Generator("cpu").manual_seed(seed_of(*key))


@dataclass(frozen=True)
class SampleRandomness:
    """What one sample of one step needs: `timestep`, `noise` of the latents' shape, two coins, three choices.

    A choice is a share, 0 to 1 without 1: of the picture's crops, its captions, and that caption's orders."""

    timestep: int
    noise: Tensor
    flip: bool
    drop_caption: bool
    crop: float
    caption: float
    order: float


def sample_randomness(
    seed: int, step: int, index: int, shape: tuple[int, int, int], loss: Loss, caption_dropout: float
) -> SampleRandomness:
    """The draws of sample `index` (counted over the whole step, accumulated batches included) of step `step`.

    `shape` is that of the latents: channels, height, width. Options of the noise and the timestep draw from generators
    of their own, so that switching one on changes no other draw."""
    source = generator(seed, "sample", step, index)
    timestep = int(torch.randint(loss.min_timestep, loss.max_timestep, (1,), generator=source))
    flip, drop = torch.rand(2, generator=source).tolist()
    noise = torch.randn(shape, generator=source)
    if loss.timestep_sampling == "logit_normal":
        normal = torch.randn((), generator=generator(seed, "timestep", step, index))
        share = torch.sigmoid(loss.logit_mean + loss.logit_std * normal)
        timestep = timestep_at(share.item(), loss.min_timestep, loss.max_timestep)
    if loss.noise_offset:
        noise = offset_noise(noise, loss.noise_offset, generator(seed, "offset noise", step, index))
    if loss.pyramid_iterations:
        source = generator(seed, "pyramid noise", step, index)
        noise = pyramid_noise(noise, loss.pyramid_iterations, loss.pyramid_discount, source)
    choices = torch.rand(3, generator=generator(seed, "choices", step, index)).tolist()
    return SampleRandomness(timestep, noise, flip < 0.5, drop < caption_dropout, *choices)


T = TypeVar("T")


def choose(share: float, among: Sequence[T]) -> T:
    """What lies at `share`, 0 to 1 without 1; every one of a kind is as likely."""
    return among[int(share * len(among))]


def shuffle_caption_tags(caption: str, kept: int, most: int) -> list[str]:
    """`most` different orders of the phrases that commas part, or all if there are no more; the first `kept` stay.

    They depend on the caption alone: runs of any seed share what is encoded, and differ in which they draw when."""
    phrases = [phrase.strip() for phrase in caption.split(",") if phrase.strip()]
    front, rest = phrases[:kept], phrases[kept:]
    if math.factorial(len(rest)) <= most:
        orders = list(permutations(range(len(rest))))
    else:
        source, seen = generator("shuffled caption", caption), {}
        while len(seen) < most:
            seen[tuple(torch.randperm(len(rest), generator=source).tolist())] = None
        orders = list(seen)
    return [", ".join([*front, *(rest[i] for i in order)]) for order in orders]


def timestep_at(share: float, first: int, end: int) -> int:
    """The timestep of [first, end) that lies at `share` (0 to 1) of the way from picture to noise.

    A share that is the sigmoid of a normal draw is logit-normal: Esser et al. 2024, arXiv 2403.03206, section 3.1."""
    return min(first + int(share * (end - first)), end - 1)  # a sigmoid of much is 1


def offset_noise(noise: Tensor, offset: float, source: torch.Generator) -> Tensor:
    """`noise` (channels, height, width) plus `offset` times one normal number a channel.

    The mean of a picture outlasts white noise nearly to the last timestep; so that it is learnt, the noise shifts it.
    Source: Guttenberg 2023, https://www.crosslabs.org/blog/diffusion-with-offset-noise; sd-scripts' --noise_offset."""
    return noise + offset * torch.randn((len(noise), 1, 1), generator=source)


def pyramid_noise(noise: Tensor, iterations: int, discount: float, source: torch.Generator) -> Tensor:
    """`noise` (channels, height, width) plus, for i = 0, 1, ..., discount ** i times noise of 1 / r ** i of its size,
    enlarged, r being drawn from [2, 4) each time and 1 pixel the end; divided by the standard deviation of the whole.

    Source: Whitaker 2023, multi-resolution noise, as sd-scripts' --multires_noise_iterations and _discount have it, but
    that those divide by the deviation of the whole batch: here no sample may depend on its company."""
    height, width = noise.shape[1:]
    for i in range(iterations):
        scale = (2 + 2 * torch.rand((), generator=source).item()) ** i
        size = max(1, int(height / scale)), max(1, int(width / scale))
        coarse = torch.randn((1, len(noise), *size), generator=source)
        noise = noise + discount**i * interpolate(coarse, (height, width), mode="bilinear")[0]
        if min(size) == 1:
            break
    return noise / noise.std()


def batches_per_epoch(buckets: list[list[int]], batch_size: int) -> int:
    return sum(math.ceil(len(bucket) / batch_size) for bucket in buckets)


def batch_indices(seed: int, batch: int, buckets: list[list[int]], batch_size: int) -> list[int]:
    """The pictures of batch number `batch`: each epoch shows every picture, in a new order, one bucket a batch.

    `buckets` lists the pictures of each size. A bucket that batches do not fill is filled from its own beginning."""
    epoch, position = divmod(batch, batches_per_epoch(buckets, batch_size))
    source = generator(seed, "order", epoch)
    plan = []
    for bucket in buckets:
        order = [bucket[i] for i in torch.randperm(len(bucket), generator=source)]
        for start in range(0, len(order), batch_size):
            plan.append([order[(start + i) % len(order)] for i in range(batch_size)])
    return plan[torch.randperm(len(plan), generator=source)[position]]
