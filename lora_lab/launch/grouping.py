"""Which jobs of a sweep can share every step, and why the others cannot."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from lora_lab.adapters.inject import DROPOUTS
from lora_lab.base.load import pick_device, pick_dtype
from lora_lab.settings.schema import Config, OptimizerTraits, Train, shared_by_pack
from lora_lab.training.lora_training import checkpoints
from lora_lab.training.memory import CONTEXT, expected_mib
from lora_lab.training.pack import split_evenly
from lora_lab.training.resolve import group_snapshots, snapshot_key, training_size

CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
ON_A_CPU = 16  # jobs that share a step where no GPU's memory sets the bound


def alone(config: Config) -> str | None:
    """Why a job cannot share its steps; None if it can."""
    adapter, stage = config.adapter, config.stage
    if not isinstance(stage, Train):
        return "only stage=train is packed"
    if adapter["_target_"] != "peft.LoraConfig" or adapter["use_dora"]:
        return "its adapter is no LoRA"
    if str(adapter["init_lora_weights"]).startswith("pissa"):
        return "PiSSA begins with the base's weights"
    if any(adapter.get(key) for key in DROPOUTS):
        return "its adapter has dropout"
    targets = adapter["target_modules"]
    if isinstance(targets, str) or any(name in CONVOLUTIONS for name in targets):
        return "its adapter is not of linear layers alone"
    if config.text.learns:
        return "something of the text learns"
    if config.prior.kind != "none":
        return "it has a prior"
    if stage.start_from:
        return "it begins with a file"
    if pick_dtype(config.model.precision, pick_device(config.device)) == torch.float16:
        return "in float16 every job scales its loss by itself"
    return None


@dataclass(frozen=True)
class Group:
    """Jobs that share their steps, by their numbers, or one that trains alone."""

    jobs: list[int]
    steps: int  # of all their LoRAs, by which goes the time that they take
    why: str = ""  # one trains alone


def groups(configs: Sequence[Config], most: int | None, workers: int = 1) -> list[Group]:
    """All jobs in groups: in their order or, for several `workers`, the longest first.

    At most `most` LoRAs at once, or as many as a GPU's memory should take."""
    found: dict[str, list[int]] = {}
    reasons = [alone(config) for config in configs]
    for i, config in enumerate(configs):
        found.setdefault(f"alone {i}" if reasons[i] else repr(shared_by_pack(config)), []).append(i)
    kinds = [snapshot_groups(configs, indices) for indices in found.values()]
    made = []
    for share in _shares(kinds, configs, workers):
        size = most or fitting([configs[course[0]] for course in share], workers)
        for part in split_evenly(share, size):
            jobs = sorted(chain.from_iterable(part))
            why = reasons[jobs[0]] or "no other job has its base, its data and its layers"
            only = len(jobs) == 1 and jobs in found.values()
            made.append(Group(jobs, sum(configs[course[0]].steps for course in part), why if only else ""))
    return sorted(made, key=lambda group: -group.steps) if workers > 1 else made


def snapshot_groups(configs: Sequence[Config], indices: Sequence[int]) -> list[list[int]]:
    """`indices` by LoRA: jobs that differ in steps alone are one training with snapshots."""
    chosen = [configs[i] for i in indices]
    newest = [next(reversed(checkpoints(Path(c.resume))), None) if c.resume else None for c in chosen]
    grouped = group_snapshots([snapshot_key(c) for c in chosen], newest, [c.steps for c in chosen])
    return [[indices[k] for k in group] for group in grouped]


def _shares(kinds: Sequence[Sequence[list[int]]], configs: Sequence[Config], workers: int) -> list[list[list[int]]]:
    """The courses of training of all kinds, laid end to end and cut into an equal share of steps for each worker; a
    kind that lies in several shares is divided."""
    total, before, parts = sum(configs[course[0]].steps for kind in kinds for course in kind), 0, []
    for kind in kinds:
        shares: dict[int, list[list[int]]] = {}
        for course in kind:
            steps = configs[course[0]].steps
            shares.setdefault((2 * before + steps) * workers // (2 * total), []).append(course)  # where its middle lies
            before += steps
        parts += shares.values()
    return parts


def fitting(configs: Sequence[Config], workers: int) -> int:
    """How many of these LoRAs the free memory of any GPU that has a worker should take at once, at least 1."""
    device = pick_device(configs[0].device)
    if device.type != "cuda":
        return ON_A_CPU
    gpus = [device] if device.index is not None else range(min(workers, torch.cuda.device_count()))
    free = min(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus) / 2**20
    largest = max(configs, key=lambda config: config.rank)
    count = 1
    while count < len(configs) and _expected(largest, count + 1) - CONTEXT < free:
        count += 1
    return count


def _expected(config: Config, count: int) -> float:
    size = training_size(config, OptimizerTraits.split(config.optimizer)[0])
    # With the VAE in tiles, as it decodes where memory is short.
    return expected_mib(replace(size, batch_size=size.batch_size * count, rank=size.rank * count), tiling=True)
