"""Counted randomness: every random number is a function of (seed, step, sample), not of what was drawn before.

A checkpoint needs no generator state, and neither the rest of a batch nor the number of processes changes a number."""

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
    """A 63-bit seed that depends on the whole key: similar keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator, so that its numbers are the same on every device."""
    return torch.Generator("cpu").manual_seed(seed_of(*key))


@dataclass(frozen=True)
class SampleRandomness:
    """The random numbers of one sample of one step. The last three are fractions in [0, 1), for `choose`."""

    timestep: int
    noise: Tensor  # (C, h, w)
    flip: bool
    drop_caption: bool
    crop: float  # which of the image's crops
    caption: float  # which of its captions
    order: float  # which of that caption's tag orders


def sample_randomness(
    seed: int, step: int, index: int, shape: tuple[int, int, int], loss: Loss, caption_dropout: float
) -> SampleRandomness:
    """The random numbers of sample `index` of a step, counted over all batches that the step accumulates.

    `shape` is that of the latents (C, h, w). Options of noise and timestep use separate generators, so that turning one
    on changes no other number."""
    source = generator(seed, "sample", step, index)
    timestep = int(torch.randint(loss.min_timestep, loss.max_timestep, (1,), generator=source))
    flip, drop = torch.rand(2, generator=source).tolist()
    noise = torch.randn(shape, generator=source)
    if loss.timestep_sampling == "logit_normal":
        normal = torch.randn((), generator=generator(seed, "timestep", step, index))
        fraction = torch.sigmoid(loss.logit_mean + loss.logit_std * normal)
        timestep = timestep_at(fraction.item(), loss.min_timestep, loss.max_timestep)
    if loss.noise_offset:
        noise = offset_noise(noise, loss.noise_offset, generator(seed, "offset noise", step, index))
    if loss.pyramid_iterations:
        source = generator(seed, "pyramid noise", step, index)
        noise = pyramid_noise(noise, loss.pyramid_iterations, loss.pyramid_discount, source)
    choices = torch.rand(3, generator=generator(seed, "choices", step, index)).tolist()
    return SampleRandomness(timestep, noise, flip < 0.5, drop < caption_dropout, *choices)


T = TypeVar("T")


def choose(fraction: float, items: Sequence[T]) -> T:
    """The item at `fraction` in [0, 1) of the list: for a uniform fraction all are equally likely."""
    return items[int(fraction * len(items))]


def shuffle_caption_tags(caption: str, kept: int, count: int) -> list[str]:
    """`count` different orders of the caption's comma-separated tags, or all if there are fewer; the first `kept` tags
    stay in place.

    They depend on the caption alone: runs with any seed share the encoded texts."""
    phrases = [phrase.strip() for phrase in caption.split(",") if phrase.strip()]
    front, rest = phrases[:kept], phrases[kept:]
    if math.factorial(len(rest)) <= count:
        orders = list(permutations(range(len(rest))))
    else:
        source, distinct = generator("shuffled caption", caption), {}
        while len(distinct) < count:
            distinct[tuple(torch.randperm(len(rest), generator=source).tolist())] = None
        orders = list(distinct)
    return [", ".join([*front, *(rest[i] for i in order)]) for order in orders]


def timestep_at(fraction: float, first: int, end: int) -> int:
    """The timestep of [first, end) at `fraction` (0 to 1) of the way from image to noise.

    The sigmoid of a normal number is logit-normal: Esser et al. 2024, arXiv 2403.03206, section 3.1."""
    return min(first + int(fraction * (end - first)), end - 1)  # a sigmoid can round to 1


def offset_noise(noise: Tensor, offset: float, source: torch.Generator) -> Tensor:
    """`noise` (C, h, w) plus `offset` times one normal number per channel.

    White noise hardly changes an image's mean until the last timesteps; the offset makes the network learn to predict
    it. Source: Guttenberg 2023, https://www.crosslabs.org/blog/diffusion-with-offset-noise; as in sd-scripts'
    --noise_offset."""
    return noise + offset * torch.randn((len(noise), 1, 1), generator=source)


def pyramid_noise(noise: Tensor, iterations: int, discount: float, source: torch.Generator) -> Tensor:
    """`noise` (C, h, w) plus, for i = 0, 1, ..., discount ** i times noise of 1 / r ** i of its size, enlarged, until
    that is 1 pixel; r is uniform in [2, 4). The sum is divided by its standard deviation.

    Source: Whitaker 2023, multi-resolution noise, as in sd-scripts' --multires_noise_iterations and _discount; those
    divide by the standard deviation of the whole batch, while here no sample may depend on the rest of its batch."""
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
    """The number of batches that show every image once; `buckets` lists the images of each size."""
    return sum(math.ceil(len(bucket) / batch_size) for bucket in buckets)


def batch_indices(seed: int, batch: int, buckets: list[list[int]], batch_size: int) -> list[int]:
    """The images of batch number `batch`: each epoch shows every image, in a new order; a batch has one bucket.

    `buckets` lists the images of each size. A bucket's last batch is filled up from the bucket's beginning."""
    epoch, position = divmod(batch, batches_per_epoch(buckets, batch_size))
    source = generator(seed, "order", epoch)
    batches = []
    for bucket in buckets:
        order = [bucket[i] for i in torch.randperm(len(bucket), generator=source)]
        for start in range(0, len(order), batch_size):
            batches.append([order[(start + i) % len(order)] for i in range(batch_size)])
    return batches[torch.randperm(len(batches), generator=source)[position]]
