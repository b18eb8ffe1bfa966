"""Several trainings on one base that share every step: in one pack, or in as many as the GPU memory requires."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from lora_lab.console import say
from lora_lab.training.base_context import BaseContext, prepare_base
from lora_lab.training.build import start_training
from lora_lab.training.checkpoint import checkpoints
from lora_lab.training.data import count_buckets
from lora_lab.training.describe import describe_pack
from lora_lab.training.memory import free_gpu_memory, out_of_memory_error
from lora_lab.training.pack import build_packed_step, clone_sharing_weights, split_evenly
from lora_lab.training.resolve import ResolvedTraining, group_snapshots
from lora_lab.training.run import TrainingRun, TrainResult, open_run
from lora_lab.training.trainer import train_runs

PackEnded = Callable[[int, TrainResult | None, Exception | None], None]  # index of the training, its result or error


def train_pack(trainings: Sequence[ResolvedTraining], on_end: PackEnded) -> None:
    """Do `trainings`, which differ only in settings that the jobs of a pack may differ in.

    Where memory runs out they go on in smaller packs, one after the other. `on_end` is called for each that is finished
    or has failed. Raises KeyboardInterrupt where Ctrl-C stopped some after a checkpoint."""
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
    queue, max_size = _with_equal_batches(trainings), len(trainings)
    while queue:
        indices = queue.pop(0)
        pack = [remaining[i] for i in indices]
        snapshots = group_snapshots([one.snapshot_key for one in pack], [one.steps for one in pack])
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


def _with_equal_batches(trainings: Sequence[ResolvedTraining]) -> list[list[int]]:
    """The indices of trainings whose batches have one shape in every step.

    With images of several sizes each seed has an order of its own."""
    several_sizes = len(count_buckets(trainings[0].images.fitted)) > 1
    groups: dict[int, list[int]] = {}
    for i, training in enumerate(trainings):
        groups.setdefault(training.seed if several_sizes else 0, []).append(i)
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


def _resumed(training: ResolvedTraining) -> ResolvedTraining:
    """The same training from its newest checkpoint, or from its beginning if it has none."""
    newest = next(reversed(checkpoints(training.folder)), None)
    return replace(training, resume_from=newest, resumed=True)
