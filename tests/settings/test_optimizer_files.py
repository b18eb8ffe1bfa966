"""What an optimizer's file says of its kind is what the optimizer does."""

import pytest
import torch

from lora_lab.launch.config import CONF, compose
from lora_lab.training.resolve import resolve_optimizer


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "optimizer").glob("*.yaml")))
def test_the_traits_in_a_file_are_those_of_the_optimizer(name):
    settings = compose(f"optimizer={name}").optimizer
    parameter = torch.nn.Parameter(torch.ones(640, 512))
    traits, make_optimizer = resolve_optimizer(settings, torch.device("cpu"))
    optimizer = make_optimizer([parameter])
    if traits.averages_weights:
        optimizer.train()
    parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()
    assert hasattr(optimizer, "eval") == traits.averages_weights
    assert ("d" in optimizer.param_groups[0]) == traits.finds_lr
    tensors = {id(value): value for value in optimizer.state[parameter].values() if torch.is_tensor(value)}
    size = sum(value.numel() * value.element_size() for value in tensors.values()) / parameter.numel()
    assert size == pytest.approx(traits.state_bytes, rel=0.1, abs=0.1)
