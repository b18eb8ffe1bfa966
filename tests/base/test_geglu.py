"""Split GEGLU layers give the outputs and gradients of diffusers' layer."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.base.layers import quantize_, split_geglu_

CPU = torch.device("cpu")
HALF = 96  # width of the values and of the gates


class Block(nn.Module):
    """The names of a UNet's parts, with a gated layer in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([GEGLU(64, HALF)])
        self.mid_block = self.up_blocks = nn.ModuleList()


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    return Block().requires_grad_(False)


class Widths(TorchDispatchMode):
    """Within the context, the widths of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.add(out.shape[-1])
        return out


def both_ways(block, *learning):
    """Output and gradients."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = block.down_blocks[0](x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    return [out, x.grad, *(parameter.grad for parameter in learning)]


def measured(block, *learning):
    """Output and gradients, and the width of the widest product."""
    with Widths() as widths:
        return both_ways(block, *learning), max(widths.seen)


def split(block):
    ours = copy.deepcopy(block)
    split_geglu_(ours)
    return ours


@pytest.mark.parametrize("form", ["base", "fp8", "int8", "nf4"])
def test_split_geglu_equals_geglu_for_every_form_of_weight(theirs, form):
    quantize_(theirs, form, "base", CPU)
    ours = split(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    (results, width), (expected, whole) = measured(ours), measured(theirs)
    torch.testing.assert_close(results, expected)
    assert (width, whole) == (HALF, 2 * HALF)


def test_fp8_products_are_not_split(theirs):
    quantize_(theirs, "fp8_products", "base", CPU)
    (results, width), (expected, _) = measured(split(theirs)), measured(theirs)
    assert all(map(torch.equal, results, expected)) and width == 2 * HALF


def test_a_projection_with_a_lora_is_not_split(theirs):
    blocks = split(theirs), theirs
    learning = []
    for block in blocks:
        torch.manual_seed(3)
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False), block)
        learning.append([p for p in block.parameters() if p.requires_grad])
    assert len(learning[0]) == 2
    (results, width), (expected, _) = (measured(block, *own) for block, own in zip(blocks, learning, strict=True))
    assert all(map(torch.equal, results, expected)) and width == 2 * HALF


def test_compiled_code_uses_diffusers_geglu(theirs):
    ours, widths = split(theirs), []

    def compiler(graph, inputs):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        widths.extend(call.meta["example_value"].shape[-1] for call in calls if call.target is nn.functional.linear)
        return graph.forward

    ours.down_blocks[0].compile(backend=compiler, fullgraph=True)
    assert all(map(torch.equal, both_ways(ours), both_ways(theirs))) and widths == [2 * HALF]


@torch.no_grad()
def test_evaluation_mode_is_bit_identical_to_diffusers(theirs):
    ours, x = split(theirs).eval(), torch.randn(2, 5, 64)
    with Widths() as widths:
        assert torch.equal(ours.down_blocks[0](x), theirs.down_blocks[0](x))
    assert widths.seen == {2 * HALF}
