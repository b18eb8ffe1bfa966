"""Split GEGLU layers give the outputs and gradients of diffusers' layer."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lora_lab.base import layers as geglu
from lora_lab.base.layers import SplitGEGLU, quantize_, split_geglu_

CPU = torch.device("cpu")


class Block(nn.Module):
    """The names of a UNet's parts, with a gated layer in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([GEGLU(64, 96)])
        self.mid_block = self.up_blocks = nn.ModuleList()


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    return Block().requires_grad_(False)


@pytest.fixture
def halves(monkeypatch):
    """How often a layer was multiplied in halves."""
    calls, before = [], geglu._halves
    monkeypatch.setattr(geglu, "_halves", lambda proj: calls.append(proj) or before(proj))
    return calls


def both_ways(block, *learning):
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = block.down_blocks[0](x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    return out, x.grad, *(parameter.grad for parameter in learning)


@pytest.mark.parametrize("form", ["base", "fp8", "int8", "nf4"])
def test_split_geglu_equals_geglu_for_every_form_of_weight(theirs, halves, form):
    quantize_(theirs, form, "base", CPU)
    ours = copy.deepcopy(theirs)
    split_geglu_(ours)
    assert type(ours.down_blocks[0]) is SplitGEGLU and ours.state_dict().keys() == theirs.state_dict().keys()
    for one, other in zip(both_ways(ours), both_ways(theirs), strict=True):
        torch.testing.assert_close(one, other)
    assert len(halves) == 1


def test_fp8_products_are_not_split(theirs, halves):
    quantize_(theirs, "fp8_products", "base", CPU)
    ours = copy.deepcopy(theirs)
    split_geglu_(ours)
    assert all(map(torch.equal, both_ways(ours), both_ways(theirs))) and not halves


def test_a_projection_with_a_lora_is_not_split(theirs, halves):
    ours = copy.deepcopy(theirs)
    split_geglu_(ours)
    learning = []
    for block in (ours, theirs):
        torch.manual_seed(3)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False), block)
        learning.append([p for p in block.parameters() if p.requires_grad])
    assert len(learning[0]) == 2
    results = (both_ways(block, *its) for block, its in zip((ours, theirs), learning, strict=True))
    assert all(map(torch.equal, *results)) and not halves


def test_compiled_code_uses_diffusers_geglu(theirs, halves):
    ours = copy.deepcopy(theirs)
    split_geglu_(ours)
    ours.down_blocks[0].compile(backend="eager", fullgraph=True)
    assert all(map(torch.equal, both_ways(ours), both_ways(theirs))) and not halves


@torch.no_grad()
def test_evaluation_mode_is_bit_identical_to_diffusers(theirs, halves):
    ours = copy.deepcopy(theirs)
    split_geglu_(ours)
    x = torch.randn(2, 5, 64)
    ours.eval()
    assert torch.equal(ours.down_blocks[0](x), theirs.down_blocks[0](x)) and not halves
