"""Quantized layers have the errors of their form, and training on them works."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters.fused import FusedAttention, fuse
from lora_lab.base import layers as storing
from lora_lab.base.layers import (
    QuantizedConv2d,
    QuantizedLinear,
    concatenate_weights,
    quantize_,
    validate_quantization,
)
from lora_lab.base.load import load_base
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.training.lora_training import FlatParams

CPU = torch.device("cpu")
ERROR = {"fp8": 0.03, "int8": 0.012, "nf4": 0.11, "fp8_products": 0.05}  # relative, of random numbers


@pytest.fixture(autouse=True)
def products_of_every_size(monkeypatch):
    """These are too small to gain by fp8."""
    monkeypatch.setattr(storing, "FP8_MIN_SIZE", 1)


class Blocks(nn.Module):
    """The names of a UNet's parts, one layer in each."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Linear(96, 192)])
        self.mid_block = nn.ModuleList([nn.Conv2d(32, 48, 3, stride=2, padding=1)])
        self.up_blocks = nn.ModuleList([nn.Linear(128, 64, bias=False)])
        self.time_embedding = nn.Linear(16, 16)


def stored_and_whole(linears: str, convolutions: str = "base") -> tuple[Blocks, Blocks]:
    torch.manual_seed(0)
    whole = Blocks().requires_grad_(False)
    stored = copy.deepcopy(whole)
    quantize_(stored, linears, convolutions, CPU)
    return stored, whole


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("form", ERROR)
def test_a_quantized_linear_layer_is_close_forward_and_backward(form):
    stored, whole = stored_and_whole(form)
    for name in ("down_blocks", "up_blocks"):
        ours, theirs = getattr(stored, name)[0], getattr(whole, name)[0]
        assert isinstance(ours, QuantizedLinear)
        outputs, gradients = [], []
        for layer in (ours, theirs):
            x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1), requires_grad=True)
            out = layer(x)
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
            outputs.append(out.detach())
            gradients.append(x.grad)
        assert 1e-4 < apart(*outputs) < ERROR[form], name
        assert 1e-4 < apart(*gradients) < ERROR[form], name
        assert 1e-4 < apart(ours.weight, theirs.weight) < ERROR[form], name
        # What is stored is what is multiplied.
        if form != "fp8_products":
            again = nn.functional.linear(torch.eye(ours.in_features), ours.weight, ours.bias)
            assert torch.allclose(ours(torch.eye(ours.in_features)), again, atol=1e-5)
    assert type(stored.time_embedding) is nn.Linear


def test_forms_that_a_device_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(InputError, match="fp8_products: this GPU cannot multiply fp8"):
        validate_quantization("fp8_products", "base", torch.device("cuda"))
    with pytest.raises(InputError, match=r"memory\.convolution_weights=fp8: there is no fp8 on this device"):
        validate_quantization("int8", "fp8", torch.device("mps"))
    validate_quantization("nf4", "fp8", torch.device("cuda"))
    validate_quantization("fp8_products", "fp8", CPU)


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_a_quantized_convolution_is_close_forward_and_backward(form):
    stored, whole = stored_and_whole("base", form)
    ours, theirs = stored.mid_block[0], whole.mid_block[0]
    assert isinstance(ours, QuantizedConv2d)
    outputs, gradients = [], []
    for layer in (ours, theirs):
        x = torch.randn(2, 32, 9, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        out = layer(x)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        outputs.append(out.detach())
        gradients.append(x.grad)
    assert 1e-4 < apart(*outputs) < ERROR[form]
    assert 1e-4 < apart(*gradients) < ERROR[form]


@pytest.mark.parametrize(("form", "bits"), [("fp8", 8), ("int8", 8), ("nf4", 4.5), ("fp8_products", 16)])
def test_a_quantized_layer_takes_its_nominal_memory(form, bits):
    stored, whole = stored_and_whole(form)
    layer = stored.down_blocks[0]
    held = sum(b.numel() * b.element_size() for b in layer.stored.buffers())
    scales = layer.stored.scale.numel() * layer.stored.scale.element_size()
    assert 8 * (held - (scales if bits != 4.5 else 64)) == whole.down_blocks[0].weight.numel() * bits
    assert "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize("form", ["base", *ERROR])
def test_layers_concatenated_into_one_product_compute_the_same(form):
    torch.manual_seed(0)
    blocks = Blocks().requires_grad_(False)
    blocks.up_blocks = nn.ModuleList([nn.Linear(128, 64, bias=False) for _ in range(3)]).requires_grad_(False)
    quantize_(blocks, form, "base", CPU)
    x, layers = torch.randn(7, 128), list(blocks.up_blocks)
    alone = [layer(x) for layer in layers]
    together = concatenate_weights(layers).product(x, None).chunk(3, dim=1)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert all(apart(layer(x), one) < ERROR.get(form, 1e-6) for layer, one in zip(layers, alone, strict=True))


@pytest.mark.parametrize(
    ("rows", "forward", "backward"), [(64, False, True), (63, False, False)]
)  # of 32 outputs and 64 inputs, which are what the way back gives
def test_only_large_products_are_computed_in_fp8(rows, forward, backward, monkeypatch):
    monkeypatch.setattr(storing, "FP8_MIN_SIZE", 64)
    torch.manual_seed(0)
    stored = storing.Fp8Matmul.of(torch.randn(32, 64), torch.float8_e4m3fn)
    x, gradient, whole = torch.randn(rows, 64), torch.randn(rows, 32), stored.weight(torch.float32)
    assert (apart(stored.product(x, None), x @ whole.T) > 0.01) == forward
    assert (apart(stored.backward_product(gradient), gradient @ whole) > 0.01) == backward


@pytest.mark.parametrize("form", ["fp8", "nf4", "fp8_products"])
def test_fused_attention_on_quantized_weights_equals_peft(form):
    def unet(fused: bool) -> nn.Module:
        unet = load_base(compose("stage=train").model, CPU).network
        quantize_(unet, form, "fp8", CPU)
        from peft import LoraConfig

        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        named = [(name, p) for name, p in unet.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for _, parameter in named:
                parameter.normal_(std=0.05)
        learnt = FlatParams(
            [p for _, b in (("A", False), ("B", True)) for n, p in named if (".lora_B." in n) == b], torch.float32
        )
        if fused:
            fuse(unet, learnt)
            assert sum(isinstance(m.processor, FusedAttention) for m in unet.modules() if hasattr(m, "processor")) == 22
        return unet

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        """What every attention computes from q, k and v of inputs of its own. Without its last projection, and not of
        the whole network: in fp8 the last bit of a number can move the rounding of the next product by percents."""
        torch.manual_seed(1)
        results = []
        for layer in (module for module in model.modules() if isinstance(module, Attention)):
            layer.to_out[0] = nn.Identity()
            text = torch.randn(1, 77, layer.to_k.in_features) if layer.is_cross_attention else None
            results.append(layer(torch.randn(1, 64, layer.to_q.in_features), encoder_hidden_states=text))
        return results

    with torch.no_grad():
        alone, together = outputs(unet(False)), outputs(unet(True))
    assert len(alone) == 22
    assert all(apart(one, other) < 1e-4 for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("memory.linear_weights=nf4 memory.convolution_weights=fp8", marks=pytest.mark.slow),
        pytest.param("memory.linear_weights=fp8_products", marks=pytest.mark.slow),
        pytest.param("memory.linear_weights=int8", marks=pytest.mark.slow),
    ],
)
def test_training_on_a_quantized_base_is_nearly_the_same(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("stage=train", "steps=4", "tracker=off", "model.judge=null", "sampler.steps=1", "stage.validate_every=0")
    common += ("stage.prompts=['A {trigger}']",)

    def train(name: str, *more: str) -> torch.Tensor:
        run_stage(compose(*common, f"name={name}", *more), tmp_path / name)
        return torch.cat(
            [v.flatten().float() for k, v in load_file(f"{name}/lora/{name}.safetensors").items() if "lora_up." in k]
        )

    stored, whole = train("stored", *how.split()), train("whole")
    assert 1e-3 < apart(stored, whole) < 0.8  # another base, but the same lesson
