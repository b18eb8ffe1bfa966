"""What is minimised: the error of the UNet's prediction, weighed by how hard the timestep is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor

from lora_lab.base.prediction import settled
from lora_lab.config import Loss


@dataclass(frozen=True)
class Batch:
    """Everything that varies from step to step, as tensors on the device; B samples of one bucket."""

    latents: Tensor  # (B, 4, height / 8, width / 8)
    noise: Tensor  # the same shape
    timesteps: Tensor  # (B,) integers
    tokens: Tensor  # (B, 77, cross attention dimension)
    pooled: Tensor  # (B, pooled dimension)
    time_ids: Tensor  # (B, 6) micro-conditioning
    weights: Tensor  # (B,) of the samples' losses


@dataclass(frozen=True)
class Objective:
    """What is asked of the UNet: `settings` on the base's noise schedule.

    The table is looked up while batches are made, so that a step itself computes nothing but with tensors."""

    settings: Loss  # settled
    schedule: DDPMScheduler
    weights: Tensor  # (timesteps,) of the loss, on the CPU


def objective(settings: Loss, scheduler: Mapping[str, Any]) -> Objective:
    """What `settings` ask of a base whose scheduler has the configuration `scheduler`. Raises InputError (settled)."""
    settings = settled(settings, scheduler)
    schedule = DDPMScheduler.from_config(
        scheduler, prediction_type=settings.prediction, rescale_betas_zero_snr=settings.zero_terminal_snr
    )
    snr = compute_snr(schedule, torch.arange(schedule.config.num_train_timesteps))
    return Objective(settings, schedule, _weights(settings, snr))


def min_snr_weights(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Loss weight per timestep: min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v-prediction.

    Source: Hang et al. 2023, arXiv 2303.09556, equation 7."""
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction == "v_prediction" else clipped / snr


def sample_losses(unet: UNet2DConditionModel, asked: Objective, batch: Batch) -> Tensor:
    """The weighed mean squared error (B,) of the UNet's prediction, in float32."""
    schedule = asked.schedule
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    conditions = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    predicted = unet(noisy, batch.timesteps, batch.tokens, added_cond_kwargs=conditions, return_dict=False)[0]
    velocity = asked.settings.prediction == "v_prediction"
    target = schedule.get_velocity(batch.latents, batch.noise, batch.timesteps) if velocity else batch.noise
    errors = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
    return errors * batch.weights


def _weights(settings: Loss, snr: Tensor) -> Tensor:
    if settings.weighting == "min_snr":
        return min_snr_weights(snr, settings.snr_gamma, settings.prediction)
    return torch.ones_like(snr)
