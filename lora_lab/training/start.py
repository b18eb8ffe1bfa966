"""From a plan to a job: the adapter in the UNet, what learns of it, its optimizer and its step."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint as recompute

from lora_lab.adapters.fresh import DROPOUTS, begin
from lora_lab.adapters.fused import fuse
from lora_lab.schema import Config
from lora_lab.training.compiled import compile_blocks
from lora_lab.training.flat import Flat
from lora_lab.training.loss import Objective
from lora_lab.training.plan import Plan
from lora_lab.training.randomness import seed_of
from lora_lab.training.step import Job, backward_pass, learning_rates


def start_job(unet: UNet2DConditionModel, asked: Objective, config: Config, plan: Plan) -> Job:
    """Put a fresh adapter into `unet`, and make what trains it."""
    torch.manual_seed(seed_of(config.seed, "adapter"))
    begin(unet, plan.adapter)
    # Only dropout draws in a step. Its state is kept for recomputing at the price of a wait a block, which also
    # rules out a graph.
    dropout = any(config.adapter.get(key) for key in DROPOUTS)
    if config.memory.gradient_checkpointing:
        unet.enable_gradient_checkpointing(
            lambda module, *args: recompute(module.__call__, *args, use_reentrant=False, preserve_rng_state=dropout)
        )
    learnt, optimizer = learner(unet, plan, config.stage.lora_plus_ratio)
    compile_blocks(unet, config.compile, config.cache and Path(config.cache))
    if hasattr(optimizer, "train"):  # a schedule-free one; see Job.finished
        optimizer.train()
    scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.dtype == torch.float16)
    capture = config.memory.capture and plan.device.type == "cuda" and not dropout
    return Job(
        unet=unet,
        learnt=learnt,
        optimizer=optimizer,
        schedule=learning_rates(optimizer, config.schedule, config.steps),
        scaler=scaler,
        settings=config.stage,
        asked=asked,
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        average=learnt.master.detach().clone() if config.stage.ema_decay else None,
        backward=backward_pass(unet, learnt, scaler, asked, config.stage.gradient_accumulation, capture),
    )


def learner(unet: UNet2DConditionModel, plan: Plan, ratio: float) -> tuple[Flat, torch.optim.Optimizer]:
    """What of `unet` learns, and its optimizer.

    Where `ratio` is not 1 the B matrices have a learning rate of their own: `ratio` times the others' (LoRA+, Hayou et
    al. 2024)."""
    named = [(name, p) for name, p in unet.named_parameters() if p.requires_grad]
    # The B matrices behind all others: so those of q, k and v are neighbours.
    first, second = ([p for name, p in named if (".lora_B." in name) == is_b] for is_b in (False, True))
    learnt = Flat([*first, *second], plan.dtype)
    fuse(unet, learnt)
    if ratio == 1:
        return learnt, plan.make_optimizer([learnt.master] if plan.elementwise else learnt.matrices())
    if plan.elementwise:
        groups = [[piece] for piece in learnt.pieces(len(first))]
    else:
        matrices = learnt.matrices()
        groups = [matrices[: len(first)], matrices[len(first) :]]
    optimizer = plan.make_optimizer([{"params": group} for group in groups])
    optimizer.param_groups[1]["lr"] *= ratio
    return learnt, optimizer
