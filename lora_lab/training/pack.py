"""Several LoRAs in one step: one pass through the frozen base, in which every sample meets its own.

Eight different LoRAs cost what batch 8 of one costs. What each of them learns is what it would learn alone."""

import copy
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lora_lab.adapters.fused import fuse, scale_of
from lora_lab.base.cuda_graph import GraphPool
from lora_lab.settings.schema import Memory
from lora_lab.training.compile import compile_blocks
from lora_lab.training.flat import FlatParams
from lora_lab.training.loss import Batch, per_sample_loss
from lora_lab.training.step import Job, of_batches


def clone_sharing_weights(unet: nn.Module) -> nn.Module:
    """Another UNet of the same weights, in the same memory: an adapter put into it is in no other."""
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in chain(unet.parameters(), unet.buffers())})


class StackedLoRAs:
    """What J jobs compute with, side by side: rows of the largest's layout, smaller ranks filled up with zeros.

    `parameters` are the largest's, whose layout it is. A zero row of A meets a zero column of B, so neither ever gets a
    gradient that counts."""

    def __init__(self, flats: Sequence[FlatParams]) -> None:
        self._flats = list(flats)
        largest = max(flats, key=lambda flat: flat.master.numel())
        self.parameters = largest.parameters
        self._places = [_places(flat.parameters, self.parameters) for flat in flats]
        self._working = largest.working.new_zeros(len(flats), largest.working.numel())
        self._gradient = torch.zeros_like(self._working)
        self.publish()

    def as_parameter(self, start: int, shape: tuple[int, ...]) -> nn.Parameter:
        """Numbers from `start` on of every row as a parameter (J, *shape); its gradient is theirs."""
        size = torch.Size(shape).numel()
        parameter = nn.Parameter(self._working[:, start : start + size].unflatten(1, shape))
        parameter.grad = self._gradient[:, start : start + size].unflatten(1, shape)
        return parameter

    @torch.no_grad()
    def collect(self) -> None:
        """After a backward pass: add each job's gradient to its master's, and make room for the next."""
        for flat, row, places in zip(self._flats, self._gradient, self._places, strict=True):
            flat.master.grad.add_(row if places is None else row[places])
        self._gradient.zero_()

    @torch.no_grad()
    def publish(self) -> None:
        """After the jobs' updates: compute with what they are now."""
        for flat, row, places in zip(self._flats, self._working, self._places, strict=True):
            if places is None:
                row.copy_(flat.master)
            else:
                row[places] = flat.master.to(row.dtype)


def _places(mine: Sequence[nn.Parameter], largest: Sequence[nn.Parameter]) -> Tensor | None:
    """Where in the largest's row the numbers of matrices lie that have fewer rows or columns; None if all fill it."""
    if all(one.shape == other.shape for one, other in zip(mine, largest, strict=True)):
        return None
    starts = accumulate((other.numel() for other in largest), initial=0)
    places = []
    for one, other, start in zip(mine, largest, starts, strict=False):
        rows, columns = (torch.arange(n, dtype=torch.int32, device=one.device) for n in one.shape)
        places.append((start + rows[:, None] * other.shape[1] + columns).flatten())
    return torch.cat(places)


class Pack:
    """Jobs that train together: all alike in what their batches and their adapters are like, but for the rank.

    The jobs' own UNets are shells of one base; none of them runs here."""

    def __init__(
        self, jobs: Sequence[Job], memory: Memory, compiled: str, cache: str | None, graphs: GraphPool | None = None
    ) -> None:
        self._stack = StackedLoRAs([job.learnt for job in jobs])
        largest = max(jobs, key=lambda job: job.learnt.master.numel())
        unet = clone_sharing_weights(largest.unet)
        names = {module: name for name, module in unet.named_modules()}

        def scales(layer: Linear) -> tuple[float, ...]:
            return tuple(scale for job in jobs for scale in scale_of(job.unet.get_submodule(names[layer])))

        left = fuse(unet, self._stack, scales)
        if left:
            raise ValueError(f"{left[0]} has an adapter that is no plain LoRA of a linear layer")
        compile_blocks(unet, compiled, cache and Path(cache))
        unet.train()
        asked, parts, count = jobs[0].asked, jobs[0].settings.gradient_accumulation, len(jobs)

        def run(batch: Batch) -> Tensor:
            losses = per_sample_loss(unet, asked, batch).unflatten(0, (count, -1)).mean(1) / parts
            losses.sum().backward()
            self._stack.collect()
            return losses.detach()

        device = largest.learnt.master.device
        capture = memory.capture and device.type == "cuda"
        self._backward = of_batches(run, graphs if capture else None, memory.cudnn_benchmark)

    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Of one batch of each job, all of one shape: adds their shares to the gradients, gives their shares of the
        losses (J,)."""
        tensors = [batch.tensors() for batch in batches]
        return self._backward(Batch.from_tensors({name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}))

    def publish(self) -> None:
        """After the jobs' updates: compute with what they are now."""
        self._stack.publish()
