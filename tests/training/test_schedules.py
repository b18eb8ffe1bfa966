"""The learning rate over the steps, as conf/schedule says."""

import math

import pytest
import torch

from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.training.lora_training import learning_rate_schedule


def rates(*overrides, steps=12):
    """The learning rate of every step, as fractions of lr."""
    config = compose(f"steps={steps}", "lr=0.5", *overrides)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.rate)
    schedule = learning_rate_schedule(optimizer, config.schedule, config.steps)
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0] / 0.5)
        optimizer.step()
        schedule.step()
    return seen


def cosine(count):
    return [(1 + math.cos(math.pi * i / count)) / 2 for i in range(count)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["schedule=constant"], [1] * 12),
        (["schedule=constant", "schedule.name=constant"], [1] * 12),
        (["schedule=constant", "schedule.warmup=4"], [0, 0.25, 0.5, 0.75] + [1] * 8),
        (["schedule=constant", "schedule.warmup=0.34"], [0, 0.25, 0.5, 0.75] + [1] * 8),
        (["schedule=linear", "schedule.warmup=2"], [0, 0.5] + [1 - i / 10 for i in range(10)]),
        (["schedule=cosine"], cosine(12)),
        (["schedule=cosine_with_restarts"], cosine(4) * 3),
        (["schedule=cosine_with_restarts", "schedule.cycles=2"], cosine(6) * 2),
        (["schedule=polynomial"], [(1 - i / 12) ** 2 for i in range(12)]),
        (["schedule=polynomial", "schedule.power=0.5"], [(1 - i / 12) ** 0.5 for i in range(12)]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_the_learning_rate_is_that_of_the_formula(overrides, expected):
    assert rates(*overrides) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("schedule.name=step", ["schedule.name=step", "cosine_with_restarts"]),
        ("schedule.warmup=-1", ["schedule.warmup=-1", "at least 0"]),
        ("schedule.warmup=nan", ["schedule.warmup=nan"]),
        ("schedule.warmup=2.5", ["schedule.warmup=2.5", "whole number of steps"]),
        ("schedule.warmup=12", ["schedule.warmup=12", "before steps=12"]),
        ("schedule.warmup=0.99", ["schedule.warmup=0.99", "before steps=12"]),
        ("schedule.name=constant schedule.warmup=3", ["constant_with_warmup"]),
        ("schedule=cosine schedule.cycles=2", ["schedule.cycles=2", "only schedule=cosine_with_restarts"]),
        ("schedule=cosine_with_restarts schedule.cycles=0", ["schedule.cycles=0", "at least 1"]),
        ("schedule=linear schedule.power=2", ["schedule.power=2.0", "only schedule=polynomial"]),
        ("schedule=polynomial schedule.power=0", ["schedule.power=0.0", "above 0"]),
        ("schedule=polynomial lr=1e-8", ["falls to 1e-7", "1e-08"]),
    ],
)
def test_a_value_without_a_meaning_is_refused(overrides, words):
    with pytest.raises(InputError) as refused:
        compose("steps=12", *overrides.split())
    assert all(word in str(refused.value) for word in words), refused.value
