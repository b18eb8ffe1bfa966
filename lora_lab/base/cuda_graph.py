"""A function of tensors as a CUDA graph: one launch in place of thousands of kernels that Python would launch.

Nothing here knows what the function does. It must do all its work on the device, on tensors that keep their addresses,
and must not wait for the device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakSet

import torch
from torch import Tensor

from lora_lab.console import say

WARM_UP_CALLS = 3  # eager calls per shape before capture: libraries choose kernels and workspaces in them

Tensors = dict[str, Tensor]


@dataclass
class GraphPool:
    """The memory that the CUDA graphs on `device` share: together they take what the largest takes.

    Whoever runs graphs that take turns (training, and sampling between its steps) gives all of them one pool."""

    device: torch.device
    graphs: WeakSet = field(default_factory=WeakSet)  # the living CUDA graphs

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """The stream of every capture: memory is reused only on the stream that it was allocated on."""
        return torch.cuda.Stream(self.device)

    def capture(self, function: Callable[[Tensors], Tensor], inputs: Tensors) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record `function(inputs)`, which runs nothing; returns the graph and its output, of the function's shape.

        Raises RuntimeError for a function that cannot be captured, and has then changed nothing."""
        graph, others = torch.cuda.CUDAGraph(), list(self.graphs)
        # The memory is freed with the last graph that uses it: `others` keeps it until this capture has begun.
        pool = others[0].pool() if others else torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            output = function(inputs)
        self.graphs.add(graph)
        return graph, output


@dataclass
class _Capture:
    """What is known of one combination of input shapes."""

    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: Tensors | None = None
    output: Tensor | None = None


class GraphedCallable:
    """`function(inputs) -> tensor`, captured once for every combination of shapes and replayed from then on.

    The first calls of a shape run eagerly and count like any other, so capturing changes nothing but the speed. The
    next call, of this or of another GraphedCallable with the same pool, overwrites the result."""

    def __init__(self, function: Callable[[Tensors], Tensor], pool: GraphPool) -> None:
        self._function, self._pool = function, pool
        self._captures: dict[tuple, _Capture] = {}
        self._failed = False  # the function cannot be captured, so it stays eager

    def __call__(self, inputs: Tensors) -> Tensor:
        """The function's result, which the next call overwrites."""
        shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        capture = self._captures.setdefault(shapes, _Capture())
        capture.calls += 1
        if capture.calls <= WARM_UP_CALLS or self._failed:
            return self._eagerly(inputs)
        if capture.graph is None and not self._capture(capture, inputs):
            return self._eagerly(inputs)
        for name, value in inputs.items():
            capture.inputs[name].copy_(value, non_blocking=True)
        capture.graph.replay()
        return capture.output

    def _eagerly(self, inputs: Tensors) -> Tensor:
        """On the stream of the capture: autograd remembers on which stream a parameter was first used."""
        current, stream = torch.cuda.current_stream(), self._pool.stream
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            output = self._function(inputs)
        current.wait_stream(stream)
        return output

    def _capture(self, capture: _Capture, inputs: Tensors) -> bool:
        """Whether it succeeded."""
        capture.inputs = {name: value.clone() for name, value in inputs.items()}
        try:
            capture.graph, capture.output = self._pool.capture(self._function, capture.inputs)
        except RuntimeError as error:
            self._failed = True
            say(f"a step can't be captured and is launched kernel by kernel: {str(error).splitlines()[0]}")
            return False
        return True
