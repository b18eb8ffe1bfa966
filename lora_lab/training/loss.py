"""What is minimised: the error of the predicted noise, weighed by how hard the timestep is."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Everything that varies from step to step, as tensors on the device; B samples of one bucket."""

    latents: Tensor  # (B, 4, height / 8, width / 8)
    noise: Tensor  # the same shape
    timesteps: Tensor  # (B,) integers
    tokens: Tensor  # (B, 77, cross attention dimension)
    pooled: Tensor  # (B, pooled dimension)
    time_ids: Tensor  # (B, 6) micro-conditioning


def min_snr_weights(snr: Tensor, gamma: float | None, prediction: str = "epsilon") -> Tensor:
    """Loss weight per sample: min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v-prediction.

    Source: Hang et al. 2023, arXiv 2303.09556, equation 7. gamma None weighs all alike."""
    if gamma is None:
        return torch.ones_like(snr)
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction == "v_prediction" else clipped / snr


def sample_losses(unet: UNet2DConditionModel, schedule: DDPMScheduler, batch: Batch, snr_gamma: float | None) -> Tensor:
    """The weighed mean squared error (B,) of the UNet's prediction, in float32."""
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    conditions = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    predicted = unet(noisy, batch.timesteps, batch.tokens, added_cond_kwargs=conditions, return_dict=False)[0]
    prediction = schedule.config.prediction_type
    velocity = prediction == "v_prediction"
    target = schedule.get_velocity(batch.latents, batch.noise, batch.timesteps) if velocity else batch.noise
    errors = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
    return errors * min_snr_weights(compute_snr(schedule, batch.timesteps), snr_gamma, prediction)
