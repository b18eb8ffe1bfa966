"""Layers of a frozen network that need less memory or time than torch's: quantized weights, and GEGLU in two halves.

Quantized weights have 8 or 4 bits per number and are dequantized when they are multiplied. A product does not store
the dequantized weight for its backward pass but dequantizes it again.

GEGLU (Shazeer 2020, arXiv 2002.05202) is the gated layer of transformer blocks. One product gives values and gates as
two halves of each row, which the following kernels read element by element. Two products of half the width give two
matrices, which are read in whole lines, and whose gradients need not be concatenated. Gating takes a seventh of SDXL's
training step on a GPU otherwise. The GELU's result is not stored but computed again in the backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from lora_lab.errors import InputError

BLOCK = 64  # numbers that share a scale in NF4; every linear layer of SDXL has a multiple of it
FP8_MIN_SIZE = 1024  # rows and outputs of a product in fp8: below, rounding x takes longer than is saved (H100)
DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


def validate_quantization(linears: str, convolutions: str, device: torch.device) -> None:
    """Raise InputError for a quantized form that `device` cannot store or multiply."""
    if device.type == "cuda" and linears == "fp8_products" and torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(
            "memory.linear_weights=fp8_products: this GPU cannot multiply fp8 (Ada, Hopper and later can), use base, "
            "or fp8 to save memory"
        )
    for key, form in (("linear_weights", linears), ("convolution_weights", convolutions)):
        if device.type == "mps" and form not in ("base", "int8"):
            raise InputError(f"memory.{key}={form}: there is no {form} on this device, use base or int8")


def quantize_(network: nn.Module, linears: str, convolutions: str, device: torch.device) -> None:
    """Move the frozen `network` to `device`, with the weights of its blocks quantized: `linears` is base (not at all),
    fp8, int8, nf4 or fp8_products, `convolutions` is base, fp8 or int8.

    Blocks are the children that diffusers' models name ..._block or ..._blocks; the layers around them are small.
    Layers are moved and quantized one by one, so that the device never holds all of them in full precision."""
    for name, child in network.named_children():
        if name.endswith(("_block", "_blocks")):
            _replace(child, linears, convolutions, device)
    network.to(device)


def _replace(module: nn.Module, linears: str, convolutions: str, device: torch.device) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear and linears != "base" and child.weight.numel() % BLOCK == 0:
            setattr(module, name, _quantized_linear(child.to(device), linears))
        elif type(child) is nn.Conv2d and convolutions != "base" and child.groups == 1 and max(child.dilation) == 1:
            setattr(
                module, name, QuantizedConv2d(child, RowwiseQuantized.of(child.to(device).weight, DTYPES[convolutions]))
            )
        else:
            _replace(child, linears, convolutions, device)


class RowwiseQuantized(nn.Module):
    """8 bits per number and one scale per row (output): a row's largest number becomes the largest of the type.

    The relative error of a product is about 2.7 % in fp8 (three bits of fraction), 0.8 % in int8."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)  # the weight's shape
        self.register_buffer("scale", scale, persistent=False)  # (outputs,)

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> "RowwiseQuantized":
        """Quantize `weight` (outputs, ...) to `dtype`, int8 or float8_e4m3fn."""
        rows = weight.detach().flatten(1).float()
        largest = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
        scale = (rows.abs().amax(1).clamp(min=1e-12) / largest).to(
            weight.dtype
        )  # rounded first, so that the codes fit it
        codes = rows / scale.float()[:, None]
        codes = codes.round() if dtype == torch.int8 else codes
        return cls(codes.to(dtype).view_as(weight), scale)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (outputs, ...)."""
        return self.codes.to(dtype) * self.scale.view(-1, *[1] * (self.codes.ndim - 1))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., I) W.T + bias (O,) -> (..., O)."""
        out = F.linear(x, self.codes.to(x.dtype))
        # The scale is applied to the outputs, which are fewer numbers than the weight.
        return out * self.scale if bias is None else torch.addcmul(bias, out, self.scale)

    def backward_product(self, gradient: Tensor) -> Tensor:
        """gradient (..., O) W -> (..., I)."""
        return (gradient * self.scale) @ self.codes.to(gradient.dtype)

    def convolve(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """The convolution of `layer` without its bias: x (B, I, H, W) -> (B, O, H', W')."""
        return _Convolution.apply(x, self.codes, layer) * self.scale.view(-1, 1, 1)

    @classmethod
    def concatenated(cls, parts: Sequence["RowwiseQuantized"]) -> "RowwiseQuantized":
        """The rows of all `parts`, in new memory."""
        return cls(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]))

    def split_rows(self, count: int) -> list["RowwiseQuantized"]:
        """`count` parts of equally many rows, in the same memory."""
        return [type(self)(*part) for part in zip(self.codes.chunk(count), self.scale.chunk(count), strict=True)]


class Fp8Matmul(RowwiseQuantized):
    """Products in fp8 too, forward and backward, on hardware that multiplies fp8 twice as fast as bf16.

    The other factor is rounded to fp8 with one scale per row. A transposed copy of the codes serves the backward
    product, so memory is that of bf16. Products that fp8 would not speed up are computed with dequantized weights."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes, scale)
        self.register_buffer("transposed", codes.t().contiguous(), persistent=False)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., I) W.T + bias (O,) -> (..., O)."""
        if not _fp8_pays(x, self.codes):
            return super().product(x, bias)
        out = _fp8_product(x, self.codes, self.scale)
        return out if bias is None else out + bias

    def backward_product(self, gradient: Tensor) -> Tensor:
        """gradient (..., O) W -> (..., I); the weight's scale is applied to the gradient's columns."""
        if not _fp8_pays(gradient, self.transposed):
            return super().backward_product(gradient)
        ones = torch.ones_like(self.scale[:1]).expand(len(self.transposed))
        return _fp8_product(gradient * self.scale, self.transposed, ones)

    def split_rows(self, count: int) -> list[RowwiseQuantized]:
        """`count` parts of equally many rows, in the same memory, without fp8 products."""
        return [RowwiseQuantized(*part) for part in zip(self.codes.chunk(count), self.scale.chunk(count), strict=True)]


def _fp8_pays(x: Tensor, codes: Tensor) -> bool:
    return min(x.shape[:-1].numel(), len(codes)) >= FP8_MIN_SIZE


def _fp8_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (..., I) times codes (O, I) with one scale per row of each -> (..., O)."""
    rows = x.reshape(-1, x.shape[-1])
    row_scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(codes.dtype).max
    out = torch._scaled_mm(
        (rows / row_scale).to(codes.dtype),
        codes.t(),
        scale_a=row_scale,
        scale_b=scale.float()[None].contiguous(),
        out_dtype=torch.bfloat16,  # the only output type that row-wise scales support
        use_fast_accum=True,
    )
    return out.to(x.dtype).view(*x.shape[:-1], -1)


class Nf4(nn.Module):
    """NF4: 4 bits per number and one scale per 64 numbers (Dettmers et al. 2023, arXiv 2305.14314); by bitsandbytes.

    The relative error of a product is about 9 %. bitsandbytes gets rows of 64, whatever the weight's shape: on a CPU
    (0.50.2) its results are wrong for rows that are no whole number of blocks."""

    def __init__(self, codes: Tensor, scale: Tensor, levels: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)  # (numbers / 2, 1)
        self.register_buffer("scale", scale, persistent=False)  # (numbers / 64,)
        self.register_buffer("levels", levels, persistent=False)  # (16,)
        self.shape = shape

    @classmethod
    def of(cls, weight: Tensor) -> "Nf4":
        """Quantize `weight` (outputs, ...), whose count of numbers is a multiple of 64."""
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight.detach().reshape(-1, BLOCK), blocksize=BLOCK, quant_type="nf4")
        return cls(codes, state.absmax, state.code, weight.shape)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (outputs, ...)."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        rows = torch.Size((self.shape.numel() // BLOCK, BLOCK))
        state = QuantState(self.scale, rows, self.levels, BLOCK, "nf4", dtype=dtype)
        return dequantize_4bit(self.codes, state).view(self.shape)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., I) W.T + bias (O,) -> (..., O)."""
        return F.linear(x, self.weight(x.dtype), bias)

    def backward_product(self, gradient: Tensor) -> Tensor:
        """gradient (..., O) W -> (..., I)."""
        return gradient @ self.weight(gradient.dtype)

    @classmethod
    def concatenated(cls, parts: Sequence["Nf4"]) -> "Nf4":
        """The rows of all `parts`, in new memory."""
        codes, scale = torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts])
        shape = torch.Size((sum(p.shape[0] for p in parts), *parts[0].shape[1:]))
        return cls(codes, scale, parts[0].levels, shape)

    def split_rows(self, count: int) -> list["Nf4"]:
        """`count` parts of equally many rows, in the same memory."""
        shape = torch.Size((self.shape[0] // count, *self.shape[1:]))
        parts = zip(self.codes.chunk(count), self.scale.chunk(count), strict=True)
        return [Nf4(codes, scale, self.levels, shape) for codes, scale in parts]


@dataclass(frozen=True)
class Dense:
    """A weight that is not quantized, with the methods of the quantized ones."""

    matrix: Tensor  # (outputs, inputs)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., I) W.T + bias (O,) -> (..., O)."""
        return F.linear(x, self.matrix, bias)

    def backward_product(self, gradient: Tensor) -> Tensor:
        """gradient (..., O) W -> (..., I)."""
        return gradient @ self.matrix


FrozenWeight = RowwiseQuantized | Nf4 | Dense


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is `stored` in one of the quantized forms."""

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None, stored: nn.Module, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self.bias, self.stored, self.dtype = bias, stored, dtype

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (O, I), computed anew."""
        return self.stored.weight(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return _Product.apply(x, self.stored, self.bias)


class QuantizedConv2d(nn.Conv2d):
    """A frozen convolution whose weight is `stored`."""

    def __init__(self, layer: nn.Conv2d, stored: RowwiseQuantized) -> None:
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(layer, name))
        self.padding_mode, self.bias, self.stored, self.dtype = (
            layer.padding_mode,
            layer.bias,
            stored,
            layer.weight.dtype,
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (O, I, height, width), computed anew."""
        return self.stored.weight(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W')."""
        out = self.stored.convolve(x, self)
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


def _quantized_linear(layer: nn.Linear, form: str) -> QuantizedLinear:
    weight = layer.weight.detach()
    if form == "nf4":
        stored = Nf4.of(weight)
    else:
        kind = Fp8Matmul if form == "fp8_products" else RowwiseQuantized
        stored = kind.of(weight, DTYPES.get(form, torch.float8_e4m3fn))
    return QuantizedLinear(layer.in_features, layer.out_features, layer.bias, stored, weight.dtype)


class _Product(torch.autograd.Function):
    """x (..., I) times a stored weight, which is dequantized again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: FrozenWeight, bias: Tensor | None) -> Tensor:
        ctx.stored = stored
        return stored.product(x, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.stored.backward_product(gradient), None, None


class _Convolution(torch.autograd.Function):
    """The convolution of `layer` with `codes`, without its bias; `codes` are converted again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, layer: nn.Conv2d) -> Tensor:
        ctx.codes, ctx.shape, ctx.layer = codes, x.shape, layer
        return F.conv2d(x, codes.to(x.dtype), None, layer.stride, layer.padding)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        layer, weight = ctx.layer, ctx.codes.to(gradient.dtype)
        return torch.nn.grad.conv2d_input(ctx.shape, weight, gradient, layer.stride, layer.padding), None, None


def concatenate_weights(layers: Sequence[nn.Linear]) -> FrozenWeight | None:
    """The weights of `layers`, which have equal sizes, with their rows one below the other: one product for all.

    From then on the layers share this memory. None if their forms differ."""
    if all(type(layer) is nn.Linear for layer in layers):
        whole = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
        for layer, part in zip(layers, whole.chunk(len(layers)), strict=True):
            layer.weight.data = part
        return Dense(whole)
    kinds = {type(layer.stored) if isinstance(layer, QuantizedLinear) else None for layer in layers}
    if len(kinds) > 1 or None in kinds:
        return None
    if len(layers) == 1:
        return layers[0].stored
    whole = kinds.pop().concatenated([layer.stored for layer in layers])
    for layer, part in zip(layers, whole.split_rows(len(layers)), strict=True):
        layer.stored = part
    return whole


def split_geglu_(network: nn.Module) -> None:
    """Let the GEGLU layers of a frozen `network` multiply in two halves while it trains."""
    for module in network.modules():
        if type(module) is GEGLU:
            module.__class__ = SplitGEGLU


class SplitGEGLU(GEGLU):
    """diffusers' layer in training. It computes as diffusers' class does where its projection has a LoRA, in compiled
    code, and in evaluation mode, so that sampled images are bit-identical to diffusers."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        proj = self.proj
        whole = not self.training or torch.compiler.is_compiling()
        if whole or type(proj) not in (nn.Linear, QuantizedLinear) or _in_fp8(proj):
            return super().forward(hidden_states)
        return _SplitGEGLUFunction.apply(hidden_states, *_halves(proj), *proj.bias.chunk(2))


def _halves(proj: nn.Linear) -> list[FrozenWeight]:
    """The weights of values and gates, in the memory of the whole."""
    if isinstance(proj, QuantizedLinear):
        return proj.stored.split_rows(2)
    return [Dense(half) for half in proj.weight.detach().chunk(2)]


def _in_fp8(proj: nn.Linear) -> bool:
    """Whether it multiplies in fp8, for which half of a weight would need a copy."""
    return isinstance(proj, QuantizedLinear) and isinstance(proj.stored, Fp8Matmul)


class _SplitGEGLUFunction(torch.autograd.Function):
    """(x V.T + b) * gelu(x G.T + c), where all but x (..., I) is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, values: FrozenWeight, gates: FrozenWeight, b: Tensor, c: Tensor) -> Tensor:
        value, gate = values.product(x, b), gates.product(x, c)
        ctx.save_for_backward(value, gate)
        ctx.values, ctx.gates = values, gates
        return value * F.gelu(gate)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, gate = ctx.saved_tensors
        d_x = ctx.values.backward_product(gradient * F.gelu(gate))
        d_x += ctx.gates.backward_product(torch.ops.aten.gelu_backward(gradient * value, gate))
        return d_x, None, None, None, None
