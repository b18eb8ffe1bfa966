"""From a plan to a job: the adapter in the UNet, what learns of it, its optimizer and its step."""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from lora_lab.adapters.fused import fuse
from lora_lab.adapters.inject import DROPOUTS, inject_adapter
from lora_lab.base.cuda_graph import GraphPool
from lora_lab.settings.schema import Config
from lora_lab.training.compile import compile_blocks
from lora_lab.training.flat import FlatParams
from lora_lab.training.loss import Objective
from lora_lab.training.plan import Plan
from lora_lab.training.randomness import seed_of
from lora_lab.training.step import Job, backward_pass, learning_rates
from lora_lab.training.text_encoders import TrainableTextEncoders, freeze_step


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn alike."""

    parameters: list[nn.Parameter]
    options: dict[str, float] = field(default_factory=dict)  # of the optimizer, where they are not its own
    stop: int | None = None  # steps after which they stay as they are


def build_training(
    unet: nn.Module,
    asked: Objective,
    config: Config,
    plan: Plan,
    read: TrainableTextEncoders | None = None,
    alone: bool = True,
    graphs: GraphPool | None = None,
) -> Job:
    """Put a fresh adapter into `unet`, and make what trains it and what of the text `read` has that learns.

    A job that is not `alone` is for a training.pack.Pack, which does the backward pass."""
    torch.manual_seed(seed_of(config.seed, "adapter"))
    inject_adapter(unet, plan.adapter)
    # Only dropout draws in a step. Its state is kept for recomputing at the price of a wait a block, which also
    # rules out a graph.
    dropout = any(config.adapter.get(key) for key in DROPOUTS)
    if config.memory.gradient_checkpointing:
        unet.enable_gradient_checkpointing(
            lambda module, *args: recompute(module.__call__, *args, use_reentrant=False, preserve_rng_state=dropout)
        )
    groups = parameter_groups(unet, read, config)
    learnt, optimizer = build_optimizer(plan, groups)
    if alone:
        fuse(unet, learnt)
        compile_blocks(unet, config.compile, config.cache and Path(config.cache))
    if hasattr(optimizer, "train"):  # a schedule-free one; see Job.finished
        optimizer.train()
    scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.dtype == torch.float16)
    capture = config.memory.capture and plan.device.type == "cuda" and not dropout
    return Job(
        unet=unet,
        learnt=learnt,
        optimizer=optimizer,
        schedule=learning_rates(optimizer, config.schedule, config.steps, [group.stop for group in groups]),
        scaler=scaler,
        settings=config.stage,
        asked=asked,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        average=learnt.master.detach().clone() if config.stage.ema_decay else None,
        backward=backward_pass(
            unet,
            learnt,
            scaler,
            asked,
            config.stage.gradient_accumulation,
            graphs if capture else None,
            config.memory.cudnn_benchmark,
            read,
            base_is_prior=config.prior.kind == "prediction",
        ),
        read=read,
        ends=[
            (parameter.grad, group.stop)
            for group, its in zip(groups, optimizer.param_groups, strict=True)
            for parameter in its["params"]
            if group.stop is not None
        ],
    )


def parameter_groups(unet: nn.Module, read: TrainableTextEncoders | None, config: Config) -> list[ParameterGroup]:
    """All that learns, by how it learns: the UNet's adapter first, then those of the text encoders, then new tokens."""
    text, ratio = config.text, config.stage.lora_plus_ratio
    groups = _adapter(unet, config.rate, ratio, {}, None)
    for position in text.adapted:
        rate = config.rate if text.encoder_lr is None else text.encoder_lr
        groups += _adapter(
            list(read.encoders.values())[position], rate, ratio, {"lr": rate}, _stop(text.encoder_stop, config)
        )
    if text.tokens:
        vectors = [tokens.vectors for tokens in read.tokens.values()]
        options = {"lr": text.token_lr, "weight_decay": 0.0}  # for what they began as is no nearer to right than 0
        groups.append(ParameterGroup(vectors, options, _stop(text.token_stop, config)))
    return groups


def _adapter(
    model: nn.Module, rate: float, ratio: float, options: dict[str, float], stop: int | None
) -> list[ParameterGroup]:
    """An adapter's parameters, with the B matrices behind all others: so those of q, k and v are neighbours.

    Where `ratio` is not 1 the B matrices have a learning rate of their own: `ratio` times the others' (LoRA+, Hayou et
    al. 2024)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".vectors")]
    first, second = ([p for name, p in named if (".lora_B." in name) == is_b] for is_b in (False, True))
    if ratio == 1:
        return [ParameterGroup([*first, *second], options, stop)]
    return [ParameterGroup(first, options, stop), ParameterGroup(second, options | {"lr": rate * ratio}, stop)]


def _stop(share: float, config: Config) -> int | None:
    return freeze_step(share, config.steps) if share < 1 else None


def build_optimizer(plan: Plan, groups: list[ParameterGroup]) -> tuple[FlatParams, torch.optim.Optimizer]:
    """All that learns, laid end to end, and its optimizer with these groups."""
    learnt = FlatParams([p for group in groups for p in group.parameters], plan.dtype)
    if len(groups) == 1:
        return learnt, plan.make_optimizer([learnt.master] if plan.elementwise else learnt.matrices())
    counts = [len(group.parameters) for group in groups]
    if plan.elementwise:
        parts = [[piece] for piece in learnt.pieces(counts)]
    else:
        matrices = iter(learnt.matrices())
        parts = [list(islice(matrices, count)) for count in counts]
    options = [{"params": part, **group.options} for part, group in zip(parts, groups, strict=True)]
    return learnt, plan.make_optimizer(options)
