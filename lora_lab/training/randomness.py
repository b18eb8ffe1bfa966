"""Randomness that is counted, not consumed: every draw is a function of (seed, step, sample).

Nothing has to be saved to go on with a run, and neither batch companions nor the number of processes change a draw."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on the whole key: near keys give unrelated seeds."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator, so that a draw is the same on every device."""
    return torch.Generator("cpu").manual_seed(seed_of(*key))


@dataclass(frozen=True)
class Draw:
    """What one sample of one step needs: `timestep` in [0, timesteps), `noise` of the latents' shape, two coins."""

    timestep: int
    noise: Tensor
    flip: bool
    drop_caption: bool


def draw(seed: int, step: int, index: int, shape: tuple[int, ...], timesteps: int, caption_dropout: float) -> Draw:
    """The draws of sample `index` (counted over the whole step, accumulated batches included) of step `step`."""
    source = generator(seed, "sample", step, index)
    timestep = int(torch.randint(timesteps, (1,), generator=source))
    flip, drop = torch.rand(2, generator=source).tolist()
    noise = torch.randn(shape, generator=source)
    return Draw(timestep, noise, flip < 0.5, drop < caption_dropout)


def batches_per_epoch(buckets: list[list[int]], batch_size: int) -> int:
    return sum(math.ceil(len(bucket) / batch_size) for bucket in buckets)


def pick(seed: int, batch: int, buckets: list[list[int]], batch_size: int) -> list[int]:
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
