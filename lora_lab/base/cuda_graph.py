"""A function of tensors as a CUDA graph: one launch instead of the thousands that Python would issue one by one.

Nothing here knows what the function does. It must do all its work on the device, by tensors that stay where they are,
and wait for none of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from lora_lab.console import say

WARM_UP_CALLS = 3  # of a shape before it is recorded: libraries choose their kernels and workspaces in them

Tensors = dict[str, Tensor]


@dataclass
class _Recording:
    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: Tensors | None = None
    output: Tensor | None = None


class GraphedCallable:
    """`function(inputs) -> tensor`, recorded once for every combination of shapes and replayed from then on.

    The first calls of a shape run eagerly and count like any other, so recording changes nothing but the speed. What
    comes back is overwritten by the next call, of this or of another: all graphs that are alive share their memory, so
    that together they take what the largest takes."""

    _graphs: ClassVar["WeakSet[torch.cuda.CUDAGraph]"] = WeakSet()  # of all

    def __init__(self, function: Callable[[Tensors], Tensor], device: torch.device) -> None:
        self._function, self._stream = function, _stream_of(device)
        self._recorded: dict[tuple, _Recording] = {}
        self._refused = False  # the function does what no graph can hold, so it stays eager

    def __call__(self, inputs: Tensors) -> Tensor:
        shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        known = self._recorded.setdefault(shapes, _Recording())
        known.calls += 1
        if known.calls <= WARM_UP_CALLS or self._refused:
            return self._eagerly(inputs)
        if known.graph is None and not self._record(known, inputs):
            return self._eagerly(inputs)
        for name, value in inputs.items():
            known.inputs[name].copy_(value, non_blocking=True)
        known.graph.replay()
        return known.output

    def _eagerly(self, inputs: Tensors) -> Tensor:
        """On the stream that will be recorded: autograd remembers where a parameter was first used."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            output = self._function(inputs)
        here.wait_stream(self._stream)
        return output

    def _record(self, known: _Recording, inputs: Tensors) -> bool:
        """Recording runs nothing, so a failed one has changed nothing either."""
        known.inputs = {name: value.clone() for name, value in inputs.items()}
        graph, others = torch.cuda.CUDAGraph(), list(GraphedCallable._graphs)
        # Their memory ends with the last of them, which may be an earlier job's: it is held until this one has begun.
        pool = others[0].pool() if others else torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                known.output = self._function(known.inputs)
        except RuntimeError as error:
            self._refused = True
            say(f"a step can't be recorded and is launched kernel by kernel: {str(error).splitlines()[0]}")
            return False
        known.graph = graph
        GraphedCallable._graphs.add(graph)
        return True


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """Of all graphs there: memory is used again on the stream alone that it was taken on."""
    return torch.cuda.Stream(device)
