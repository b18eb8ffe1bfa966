"""All trainable parameters in one piece of memory: gradient clipping and the optimizer launch a few kernels instead of
thousands."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn


class FlatParams:
    """Parameters laid end to end, N numbers in all.

    `model_copy` (N,) is what the model computes with, in the model's precision. `master` (N,) is what the optimizer
    updates, in float32: half precision would round most updates away. For a float32 model both are the same memory.
    The parameters stay in the model and become views of `model_copy`; so do their gradients, which `accumulate_grads`
    adds to the master's gradient in float32."""

    def __init__(self, params: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        """Take over `params`, whose model computes in `dtype`."""
        self.params = list(params)
        self.master = nn.Parameter(torch.cat([p.detach().float().reshape(-1) for p in self.params]))
        self.model_copy = self.master.detach().to(dtype)  # the same memory for float32
        self._gradient = torch.zeros_like(self.model_copy)
        self._same_memory = dtype == torch.float32
        self.master.grad = self._gradient if self._same_memory else torch.zeros_like(self.master)
        self._point_params_at(self.model_copy, self._gradient)

    def views(self, flat: Tensor) -> list[Tensor]:
        """`flat` (N,) split into views of the parameters' shapes."""
        pieces = flat.detach().split([p.numel() for p in self.params])
        return [piece.view_as(p) for piece, p in zip(pieces, self.params, strict=True)]

    def matrices(self) -> list[nn.Parameter]:
        """The master as one parameter of each original shape, for an optimizer that must know shapes."""
        return list(map(_with_grad, self.views(self.master), self.views(self.master.grad)))

    def as_parameter(self, start: int, shape: tuple[int, ...]) -> nn.Parameter:
        """The numbers from `start` on as one more parameter (1, *shape): neighbours seen as one.

        It shares memory with the model's copy, and its gradient with theirs."""
        end = start + math.prod(shape)
        return _with_grad(self.model_copy[start:end].view(1, *shape), self._gradient[start:end].view(1, *shape))

    def split(self, counts: Sequence[int]) -> list[nn.Parameter]:
        """The master as one flat parameter per group: the first counts[0] parameters, the next counts[1], and so on."""
        remaining = iter(self.params)
        sizes = [sum(p.numel() for p in islice(remaining, count)) for count in counts]
        return list(map(_with_grad, self.master.detach().split(sizes), self.master.grad.split(sizes)))

    def accumulate_grads(self) -> None:
        """Add the gradients of a backward pass to the master's, and set the model's to zero for the next one."""
        if not self._same_memory:
            self.master.grad.add_(self._gradient)
            self._gradient.zero_()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float | None) -> Tensor:
        """Scale the master's gradient down to `max_norm` where it is longer; None leaves it.

        Returns the norm () before clipping, without waiting for the device."""
        norm = torch.linalg.vector_norm(self.master.grad)
        if max_norm is not None:
            self.master.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """After an update: copy the master to the model, and set its gradient to zero for the next step."""
        if not self._same_memory:
            self.model_copy.copy_(self.master)
        self.master.grad.zero_()

    @torch.no_grad()
    def load_(self, values: Tensor) -> None:
        """Overwrite master and model copy with `values` (N,). Gradients stay."""
        self.master.copy_(values)
        self.model_copy.copy_(self.master)

    @contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Within the context the model's parameters are the float32 master, so that weights can be loaded exactly."""
        if self._same_memory:
            yield
            return
        try:
            self._point_params_at(self.master, None)
            yield
        finally:
            self._point_params_at(self.model_copy, self._gradient)
            with torch.no_grad():
                self.model_copy.copy_(self.master)

    def _point_params_at(self, flat: Tensor, gradient: Tensor | None) -> None:
        gradients = [None] * len(self.params) if gradient is None else self.views(gradient)
        for parameter, view, grad in zip(self.params, self.views(flat), gradients, strict=True):
            parameter.grad = None  # torch refuses a gradient of another dtype than the data
            parameter.data = view
            parameter.grad = grad


def _with_grad(data: Tensor, gradient: Tensor) -> nn.Parameter:
    """A parameter in the memory of `data`, whose gradient lies in that of `gradient`."""
    parameter = nn.Parameter(data)
    parameter.grad = gradient
    return parameter
