"""Several LoRAs in one step: one pass through the frozen base, in which each sample meets its own LoRA.

Eight different LoRAs cost what batch 8 of one LoRA costs, and each learns what it would learn alone. Trainings on one
base share every step in one pack, or in as many as the GPU memory requires."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import TypeVar

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lora_lab.adapters.fused import fuse, scale_of
from lora_lab.base.cuda_graph import GraphPool
from lora_lab.console import say
from lora_lab.settings.schema import Memory
from lora_lab.training.base_context import BaseContext, free_gpu_memory, prepare_base
from lora_lab.training.engine import Losses, StepBatches, captured, compile_blocks
from lora_lab.training.lora_training import FlatParams, LoRATraining, checkpoints, damage, newest_checkpoint, step_of
from lora_lab.training.loss import Batch, per_sample_loss
from lora_lab.training.memory import out_of_memory_error
from lora_lab.training.resolve import ResolvedTraining, group_snapshots
from lora_lab.training.run import TrainingRun, TrainResult, describe_pack, open_run
from lora_lab.training.trainer import start_training, train_runs

T = TypeVar("T")


def clone_sharing_weights(network: nn.Module) -> nn.Module:
    """A second network whose weights are the same memory: an adapter injected into one is in no other."""
    return copy.deepcopy(network, {id(t): t for t in chain(network.parameters(), network.buffers())})


class StackedLoRAs:
    """The weights of J LoRAs side by side (J, N), in the layout of the LoRA of the largest rank.

    Smaller ranks are padded with zeros. A zero row of A meets a zero column of B, so the gradients of both are never
    used."""

    def __init__(self, flats: Sequence[FlatParams]) -> None:
        """`flats` are the parameters of the J LoRAs, of the same layers."""
        self._flats = list(flats)
        largest = max(flats, key=lambda flat: flat.master.numel())
        self.params = largest.params
        self._positions = [_positions(flat.params, self.params) for flat in flats]
        self._weights = largest.model_copy.new_zeros(len(flats), largest.model_copy.numel())
        self._gradient = torch.zeros_like(self._weights)
        self.copy_from_masters()

    def as_parameter(self, start: int, shape: tuple[int, ...]) -> nn.Parameter:
        """The numbers from `start` on of all rows as one parameter (J, *shape), which shares their gradient."""
        size = torch.Size(shape).numel()
        parameter = nn.Parameter(self._weights[:, start : start + size].unflatten(1, shape))
        parameter.grad = self._gradient[:, start : start + size].unflatten(1, shape)
        return parameter

    @torch.no_grad()
    def accumulate_grads(self) -> None:
        """Add each row's gradient to its LoRA's master gradient, and set the stack's to zero for the next pass."""
        for flat, row, positions in zip(self._flats, self._gradient, self._positions, strict=True):
            flat.master.grad.add_(row if positions is None else row[positions])
        self._gradient.zero_()

    @torch.no_grad()
    def copy_from_masters(self) -> None:
        """After the updates: copy each LoRA's master to its row."""
        for flat, row, positions in zip(self._flats, self._weights, self._positions, strict=True):
            if positions is None:
                row.copy_(flat.master)
            else:
                row[positions] = flat.master.to(row.dtype)


def _positions(smaller: Sequence[nn.Parameter], largest: Sequence[nn.Parameter]) -> Tensor | None:
    """Where the numbers of matrices with fewer rows or columns lie in the largest LoRA's row; None if all fill it."""
    if all(one.shape == other.shape for one, other in zip(smaller, largest, strict=True)):
        return None
    starts = accumulate((matrix.numel() for matrix in largest), initial=0)
    positions = []
    for one, other, start in zip(smaller, largest, starts, strict=False):
        rows, columns = (torch.arange(n, dtype=torch.int32, device=one.device) for n in one.shape)
        positions.append((start + rows[:, None] * other.shape[1] + columns).flatten())
    return torch.cat(positions)


@dataclass(frozen=True)
class PackedStep:
    """The engine for J LoRAs on one base, alike in their batches and adapted layers but not in rank.

    The trainings' own networks share the base's weights; none of them runs here."""

    trainings: Sequence[LoRATraining]
    stack: StackedLoRAs
    backward: Callable[[Batch], Tensor]  # adds the gradients of J batches in one; returns shares of the losses (J,)

    def forward_backward(self, batches: Sequence[StepBatches]) -> list[Losses]:
        """See StepEngine. All trainings' batches have one shape."""
        losses = torch.zeros(len(self.trainings), device=self.trainings[0].params.master.device)
        for accumulated in zip(*(step_batches.character for step_batches in batches), strict=True):
            losses += self.backward(concatenate(accumulated))
        return [{"loss": loss} for loss in losses]

    def sync_weights(self) -> None:
        """See StepEngine."""
        for training in self.trainings:
            training.params.copy_to_model()
        self.stack.copy_from_masters()


def build_packed_step(
    trainings: Sequence[LoRATraining],
    memory: Memory,
    compile_mode: str,
    cache: Path | None,
    graphs: GraphPool | None = None,
) -> PackedStep:
    """The engine for several trainings of plain LoRAs on linear layers. Raises ValueError for another adapter."""
    stack = StackedLoRAs([training.params for training in trainings])
    largest = max(trainings, key=lambda training: training.params.master.numel())
    network = clone_sharing_weights(largest.network)
    names = {module: name for name, module in network.named_modules()}

    def scales(layer: Linear) -> tuple[float, ...]:
        layers = (training.network.get_submodule(names[layer]) for training in trainings)
        return tuple(scale for other in layers for scale in scale_of(other))

    unfused = fuse(network, stack, scales)
    if unfused:
        raise ValueError(f"{unfused[0]} has an adapter that is not a plain LoRA of a linear layer")
    compile_blocks(network, compile_mode, cache)
    network.train()
    objective, accumulation = trainings[0].objective, trainings[0].settings.gradient_accumulation

    def backward(batch: Batch) -> Tensor:
        per_lora = per_sample_loss(network, objective, batch).unflatten(0, (len(trainings), -1))
        losses = per_lora.mean(1) / accumulation
        losses.sum().backward()
        stack.accumulate_grads()
        return losses.detach()

    capture = memory.capture and graphs is not None and graphs.device.type == "cuda"
    return PackedStep(trainings, stack, captured(backward, graphs if capture else None, memory.cudnn_benchmark))


def split_evenly(items: list[T], max_size: int) -> list[list[T]]:
    """`items` in as few parts as have at most `max_size` each, of about equal size."""
    count = -(-len(items) // max_size)
    return [items[len(items) * k // count : len(items) * (k + 1) // count] for k in range(count)]


def concatenate(batches: Sequence[Batch]) -> Batch:
    """J batches of B samples and one shape as one batch of J * B samples."""
    tensors = [batch.tensors() for batch in batches]
    return Batch.from_tensors({name: torch.cat([values[name] for values in tensors]) for name in tensors[0]})


PackEnded = Callable[[int, TrainResult | None, Exception | None], None]  # index of the training, its result or error


def train_pack(trainings: Sequence[ResolvedTraining], on_end: PackEnded) -> None:
    """Do `trainings`, which differ only in settings that the jobs of a pack may differ in.

    Where memory runs out they go on in smaller packs, one after the other. `on_end` is called for each that is finished
    or has failed. Raises KeyboardInterrupt where Ctrl-C stopped some after a checkpoint."""
    trainings = _from_one_step(trainings)
    remaining = dict(enumerate(trainings))

    def ended(i: int, result: TrainResult | None, error: Exception | None) -> None:
        del remaining[i]
        on_end(i, result, error)

    def do_not_fit(indices: Sequence[int]) -> None:
        for i in [i for i in indices if i in remaining]:
            one = remaining[i]
            ended(i, None, out_of_memory_error(one.memory, one.batch_size, one.folder))

    say(describe_pack({training.folder.name: training for training in trainings}))
    try:
        context = prepare_base(trainings[0])
    except torch.OutOfMemoryError:  # a smaller pack would not help
        return do_not_fit(list(remaining))
    queue, max_size = _with_equal_batches(trainings, len(context.data.buckets)), len(trainings)
    while queue:
        indices = queue.pop(0)
        pack = [remaining[i] for i in indices]
        snapshots = group_snapshots(*zip(*((t.snapshot_key, t.resume_from, t.steps) for t in pack), strict=True))
        loras = [[indices[k] for k in group] for group in snapshots]  # of each LoRA the runs that follow it
        if len(loras) > max_size:
            queue[:0] = [list(chain.from_iterable(part)) for part in split_evenly(loras, max_size)]
        elif not _train_one_pack({i: remaining[i] for i in indices}, loras, context, ended):
            if len(loras) == 1:
                do_not_fit(indices)
                continue
            max_size = -(-len(loras) // 2)
            say(f"out of GPU memory for {len(loras)} LoRAs at once: training goes on with at most {max_size} at a time")
            unfinished = [i for i in indices if i in remaining]
            remaining |= {i: _resumed(remaining[i]) for i in unfinished}
            queue[:0] = [unfinished] if unfinished else []


def _with_equal_batches(trainings: Sequence[ResolvedTraining], sizes: int) -> list[list[int]]:
    """The indices of trainings whose batches have one shape in every step; the images have so many sizes.

    With images of several sizes each seed has an order of its own."""
    groups: dict[int, list[int]] = {}
    for i, training in enumerate(trainings):
        groups.setdefault(training.seed if sizes > 1 else 0, []).append(i)
    return list(groups.values())


def _train_one_pack(
    resolved: Mapping[int, ResolvedTraining], loras: Sequence[Sequence[int]], context: BaseContext, ended: PackEnded
) -> bool:
    """Train in one pack; `loras` has, of each LoRA, the runs that follow it, the longest first.

    False if memory ran out. Then nothing of the pack is referred to any more: an exception would keep it alive."""
    first = next(iter(resolved.values()))
    make_engine = partial(
        build_packed_step,
        memory=first.memory,
        compile_mode=first.compile,
        cache=first.cache,
        graphs=context.encoder.graphs,
    )
    free_gpu_memory(context.encoder.device)
    try:
        with ExitStack() as stack:
            runs: dict[int, TrainingRun] = {}
            for indices in loras:
                network = clone_sharing_weights(context.encoder.base.network)
                training = start_training(resolved[indices[0]], context, network)
                for i in indices:
                    runs[i] = stack.enter_context(open_run(resolved[i], training, context))
            indices_of = {id(run): i for i, run in runs.items()}

            def run_ended(run: TrainingRun) -> None:
                ended(indices_of[id(run)], run.result, run.error)

            train_runs(list(runs.values()), context, make_engine, run_ended)
            stopped = [run.step for run in runs.values() if run.unfinished]
    except torch.OutOfMemoryError:
        return False
    if stopped:
        raise KeyboardInterrupt(f"stopped after step {max(stopped)}")
    return True


def _from_one_step(trainings: Sequence[ResolvedTraining]) -> list[ResolvedTraining]:
    """`trainings` from the newest step of which all have a checkpoint, so that every step has the same pack as it would
    have had without the interruption; unchanged where there is no such step."""
    if not all(one.resume_from for one in trainings) or len({one.resume_from.name for one in trainings}) == 1:
        return list(trainings)
    newest = min(step_of(one.resume_from) for one in trainings)
    stored = [{c.name for c in checkpoints(one.folder) if step_of(c) <= newest and not damage(c)} for one in trainings]
    common = set.intersection(*stored)
    if not common:
        return list(trainings)
    name = max(common, key=lambda name: step_of(Path(name)))
    return [replace(one, resume_from=one.resume_from.with_name(name)) for one in trainings]


def _resumed(training: ResolvedTraining) -> ResolvedTraining:
    """The same training from its newest checkpoint, or from its beginning if it has none."""
    return replace(training, resume_from=newest_checkpoint(training.folder), resumed=True)
