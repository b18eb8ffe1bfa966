"""Quantized weights on a GPU equal those on a CPU, also in a CUDA graph and in compiled code.

python -m pytest tests/gpu/test_quantize.py -m gpu -n 0"""

import copy

import pytest
import torch
from torch import nn

from lora_lab.base import layers as quantize
from lora_lab.base.cuda_graph import WARM_UP_CALLS, GraphedCallable, GraphPool
from lora_lab.base.layers import quantize_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ERROR = {"base": 0.01, "fp8": 0.04, "int8": 0.02, "nf4": 0.12, "fp8_products": 0.06}  # relative, in bfloat16


class Blocks(nn.Module):
    """The names of a UNet's parts, one layer in each."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Linear(640, 1280)])
        self.mid_block = nn.ModuleList([nn.Linear(1280, 1280, bias=False)])
        self.up_blocks = nn.ModuleList([nn.Conv2d(64, 96, 3, padding=1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid_block[0](nn.functional.silu(self.down_blocks[0](x)))
        return self.up_blocks[0](x.view(-1, 64, 4, 5))


def both_ways(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output and the input's gradient, end to end."""
    x = x.detach().requires_grad_()
    out = network(x)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
    return torch.cat([out.detach().flatten().float(), gradient.flatten().float()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("form", ERROR)
@pytest.mark.parametrize("how", ["eager", "graph", "compiled"])
def test_a_quantized_layer_is_close_to_the_original(form, how, monkeypatch):
    monkeypatch.setattr(quantize, "FP8_MIN_SIZE", 1)
    torch.manual_seed(0)
    device = torch.device("cuda")
    whole = Blocks().requires_grad_(False)
    network = copy.deepcopy(whole).bfloat16()
    quantize_(network, form, "base" if form in ("base", "nf4", "fp8_products") else form, device)
    x = torch.randn(32, 640)
    expected = both_ways(whole, x)
    if how == "compiled":
        network.compile(dynamic=False, fullgraph=True)
    run = lambda inputs: both_ways(network, inputs["x"])  # noqa: E731
    run = GraphedCallable(run, GraphPool(device)) if how == "graph" else run
    for _ in range(WARM_UP_CALLS + 2):
        found = run({"x": x.bfloat16().to(device)}).clone()
    sizes = [len(found) - x.numel(), x.numel()]
    errors = [apart(*each) for each in zip(found.cpu().split(sizes), expected.split(sizes), strict=True)]
    print(f"MEASURED {form} {how} {errors}")
    assert max(errors) < 3 * ERROR[form]  # two products and the gradient of a square, one after another
