"""From a resolved training to a LoRATraining: the adapter in the network, its parameters, optimizer and schedule."""

from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from lora_lab.adapters.inject import DROPOUTS, inject_adapter, load_adapter_weights
from lora_lab.base.load import base_class
from lora_lab.training.base_context import BaseContext
from lora_lab.training.checkpoint import load_checkpoint
from lora_lab.training.flat import FlatParams
from lora_lab.training.lora_training import LoRATraining, learning_rate_schedule
from lora_lab.training.loss import Objective, objective
from lora_lab.training.memory import gc_paused
from lora_lab.training.randomness import seed_of
from lora_lab.training.resolve import ResolvedTraining
from lora_lab.training.text_encoders import TrainableTextEncoders, freeze_step, inject_text_adapters


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one learning rate."""

    params: list[nn.Parameter]
    options: dict[str, float] = field(default_factory=dict)  # of the optimizer, where they differ from its defaults
    freeze_after: int | None = None  # steps after which the group is frozen


def start_training(resolved: ResolvedTraining, context: BaseContext, network: nn.Module) -> LoRATraining:
    """Build the training on `network` (the base's, or a clone that shares its weights), and load the checkpoint or the
    LoRA that it starts from. Raises InputError for one that does not fit."""
    base = context.encoder.base
    with gc_paused():
        text_encoders = inject_text_adapters(
            base, resolved.device, resolved.text, resolved.trigger, resolved.seed, resolved.adapter
        )
        training = build_training(network, objective(resolved.loss, base), resolved, text_encoders)
    if resolved.resume_from:
        load_checkpoint(resolved.resume_from, training)
    elif resolved.start_lora:
        with training.params.in_fp32():
            load_adapter_weights(base, resolved.start_lora)
        if training.average is not None:
            training.average.copy_(training.params.master.detach())
    return training


def build_training(
    network: nn.Module,
    loss_objective: Objective,
    resolved: ResolvedTraining,
    text_encoders: TrainableTextEncoders | None = None,
) -> LoRATraining:
    """Inject a fresh adapter into `network`, and build optimizer and schedule of all trainable parameters.

    Raises InputError for an adapter that does not fit the network."""
    torch.manual_seed(seed_of(resolved.seed, "adapter"))
    inject_adapter(network, resolved.adapter)
    # Dropout alone draws random numbers in a step. Keeping its state for recomputation waits for the device once a
    # block, which also rules out a CUDA graph.
    dropout = any(getattr(resolved.adapter, key, 0.0) for key in DROPOUTS)
    if resolved.memory.gradient_checkpointing:
        network.enable_gradient_checkpointing(
            lambda module, *args: recompute(module.__call__, *args, use_reentrant=False, preserve_rng_state=dropout)
        )
    groups = parameter_groups(network, text_encoders, resolved)
    params = FlatParams([p for group in groups for p in group.params], resolved.dtype)
    optimizer = build_optimizer(params, groups, resolved)
    if hasattr(optimizer, "train"):  # a schedule-free one; see LoRATraining.swap_in_saved_weights
        optimizer.train()
    frozen_from = [group.freeze_after for group in groups]
    return LoRATraining(
        network=network,
        network_name=base_class(resolved.model).network_name,
        params=params,
        optimizer=optimizer,
        schedule=learning_rate_schedule(optimizer, resolved.schedule, resolved.steps, frozen_from),
        scaler=torch.amp.GradScaler(resolved.device.type, enabled=resolved.dtype == torch.float16),
        settings=resolved.settings,
        objective=loss_objective,
        batch_size=resolved.batch_size,
        seed=resolved.seed,
        average=params.master.detach().clone() if resolved.settings.ema_decay else None,
        text_encoders=text_encoders,
        freeze_after=[
            (parameter.grad, last_step)
            for last_step, group in zip(frozen_from, optimizer.param_groups, strict=True)
            for parameter in group["params"]
            if last_step is not None
        ],
        captures=resolved.memory.capture and resolved.device.type == "cuda" and not dropout,
    )


def parameter_groups(
    network: nn.Module, text_encoders: TrainableTextEncoders | None, resolved: ResolvedTraining
) -> list[ParameterGroup]:
    """All trainable parameters: the network's adapter first, then those of the text encoders, then new tokens."""
    text, ratio = resolved.text, resolved.settings.lora_plus_ratio
    groups = _adapter_groups(network, resolved.lr, ratio, {}, None)
    for position in text.adapted:
        lr = resolved.lr if text.encoder_lr is None else text.encoder_lr
        last_step = _last_step(text.encoder_stop, resolved.steps)
        groups += _adapter_groups(list(text_encoders.encoders.values())[position], lr, ratio, {"lr": lr}, last_step)
    if text.tokens:
        vectors = [tokens.vectors for tokens in text_encoders.tokens.values()]
        options = {
            "lr": text.token_lr,
            "weight_decay": 0.0,
        }  # zero is no better than where an embedding starts
        groups.append(ParameterGroup(vectors, options, _last_step(text.token_stop, resolved.steps)))
    return groups


def _adapter_groups(
    module: nn.Module, lr: float, ratio: float, options: dict[str, float], freeze_after: int | None
) -> list[ParameterGroup]:
    """An adapter's parameters, the B matrices after all others, so that those of q, k and v are neighbours.

    Where `ratio` is not 1 the B matrices have `ratio` times the learning rate `lr` (LoRA+, Hayou et al. 2024)."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and not name.endswith(".vectors")]
    others, b_matrices = ([p for name, p in named if (".lora_B." in name) == is_b] for is_b in (False, True))
    if ratio == 1:
        return [ParameterGroup([*others, *b_matrices], options, freeze_after)]
    return [
        ParameterGroup(others, options, freeze_after),
        ParameterGroup(b_matrices, options | {"lr": lr * ratio}, freeze_after),
    ]


def _last_step(fraction: float, steps: int) -> int | None:
    return freeze_step(fraction, steps) if fraction < 1 else None


def build_optimizer(
    params: FlatParams, groups: list[ParameterGroup], resolved: ResolvedTraining
) -> torch.optim.Optimizer:
    """The optimizer of `params`, whose parameters are those of `groups` in their order."""
    if len(groups) == 1:
        return resolved.make_optimizer([params.master] if resolved.elementwise else params.matrices())
    counts = [len(group.params) for group in groups]
    if resolved.elementwise:
        parts = [[part] for part in params.split(counts)]
    else:
        matrices = iter(params.matrices())
        parts = [list(islice(matrices, count)) for count in counts]
    return resolved.make_optimizer(
        [{"params": part, **group.options} for part, group in zip(parts, groups, strict=True)]
    )
