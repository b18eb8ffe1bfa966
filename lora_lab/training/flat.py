"""All that learns in one piece of memory, so that clipping and the optimizer are a few kernels instead of thousands."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn


class FlatParams:
    """Parameters laid end to end: `working` is what the model computes with, in its precision; `master` what the
    optimizer changes, in float32, for half precision would round most updates away.

    Where the model computes in float32 both are the same memory. The parameters stay where they are in the model and
    become views; so do their gradients, which `collect` adds up in float32."""

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = list(parameters)
        self.master = nn.Parameter(torch.cat([p.detach().float().reshape(-1) for p in self.parameters]))
        self.working = self.master.detach().to(dtype)  # the same memory, if it is float32 too
        self._gradient = torch.zeros_like(self.working)
        self._alike = dtype == torch.float32
        self.master.grad = self._gradient if self._alike else torch.zeros_like(self.master)
        self._show(self.working, self._gradient)

    def views(self, flat: Tensor) -> list[Tensor]:
        """`flat` cut into pieces of the parameters' shapes."""
        pieces = flat.detach().split([p.numel() for p in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]

    def matrices(self) -> list[nn.Parameter]:
        """The master one by one, for an optimizer that must know shapes."""
        return list(map(_learning, self.views(self.master), self.views(self.master.grad)))

    def as_parameter(self, start: int, shape: tuple[int, ...]) -> nn.Parameter:
        """Numbers from `start` on as another parameter (1, *shape): neighbours seen as one. What it is given as
        gradient is theirs."""
        end = start + math.prod(shape)
        return _learning(self.working[start:end].view(1, *shape), self._gradient[start:end].view(1, *shape))

    def pieces(self, counts: Sequence[int]) -> list[nn.Parameter]:
        """The master of the first counts[0] parameters, of the next counts[1], and so on to the last, for an optimizer
        with as many groups."""
        each = iter(self.parameters)
        sizes = [sum(p.numel() for p in islice(each, count)) for count in counts]
        numbers, gradients = self.master.detach().split(sizes), self.master.grad.split(sizes)
        return list(map(_learning, numbers, gradients))

    def collect(self) -> None:
        """After a backward pass: add its gradients to the master's, and make room for the next."""
        if not self._alike:
            self.master.grad.add_(self._gradient)
            self._gradient.zero_()

    @torch.no_grad()
    def clip(self, most: float | None) -> Tensor:
        """The norm of the gradient; it is scaled down to `most` where it is longer. Waits for no number."""
        norm = torch.linalg.vector_norm(self.master.grad)
        if most is not None:
            self.master.grad.mul_((most / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """After an update: let the model compute with it, and start the next step's gradient from zero."""
        if not self._alike:
            self.working.copy_(self.master)
        self.master.grad.zero_()

    @torch.no_grad()
    def become(self, values: Tensor) -> None:
        """Put `values`, of the master's shape, in its place; the model computes with them."""
        self.master.copy_(values)
        self.working.copy_(self.master)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within the context the model's parameters are the master's float32 numbers, to be loaded."""
        if self._alike:
            yield
            return
        try:
            self._show(self.master, None)
            yield
        finally:
            self._show(self.working, self._gradient)
            with torch.no_grad():
                self.working.copy_(self.master)

    def _show(self, flat: Tensor, gradient: Tensor | None) -> None:
        gradients = [None] * len(self.parameters) if gradient is None else self.views(gradient)
        for parameter, view, grad in zip(self.parameters, self.views(flat), gradients, strict=True):
            parameter.grad = None  # of another precision than what comes
            parameter.data = view
            parameter.grad = grad


def _learning(numbers: Tensor, gradient: Tensor) -> nn.Parameter:
    """A parameter in the memory of `numbers` with its gradient in that of `gradient`."""
    parameter = nn.Parameter(numbers)
    parameter.grad = gradient
    return parameter
