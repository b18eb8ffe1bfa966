"""What is minimised: the error of the UNet's prediction, weighed by how hard the timestep is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor

from lora_lab.base.prediction import resolve_prediction_type
from lora_lab.errors import InputError
from lora_lab.settings.schema import Loss


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Everything that varies from step to step, as tensors on the device; B samples of one bucket.

    Texts come encoded, or as token ids where what encodes them learns (training/text.py)."""

    latents: Tensor  # (B, 4, height / 8, width / 8)
    noise: Tensor  # the same shape
    timesteps: Tensor  # (B,) integers
    tokens: Tensor | None = None  # (B, 77, cross attention dimension)
    pooled: Tensor | None = None  # (B, pooled dimension)
    ids: Tensor | None = None  # (B, 2, 77) integers, of either text encoder
    given: Tensor | None = None  # (B,) whether there is a text; if not, zeros stand for it
    time_ids: Tensor  # (B, 6) micro-conditioning
    weights: Tensor  # (B,) of the samples' losses
    huber_delta: Tensor  # (B,) where large errors begin
    mask: Tensor | None = None  # (B, 1, height / 8, width / 8) of the latent pixels' errors; None weighs all alike
    prior_weight: Tensor | None = None  # () of the whole loss of a batch of the prior; None is one of the character


@dataclass(frozen=True)
class Objective:
    """What is asked of the UNet: `settings` on the base's noise schedule.

    The tables are looked up while batches are made, so that a step itself computes nothing but with tensors."""

    settings: Loss  # settled
    schedule: DDPMScheduler
    weights: Tensor  # (timesteps,) of the loss, on the CPU
    huber_delta: Tensor  # (timesteps,), on the CPU


def objective(settings: Loss, scheduler: Mapping[str, Any]) -> Objective:
    """What `settings` ask of a base whose scheduler has the configuration `scheduler`. Raises InputError."""
    settings = resolve_prediction_type(settings, scheduler)
    schedule = DDPMScheduler.from_config(
        scheduler, prediction_type=settings.prediction, rescale_betas_zero_snr=settings.zero_terminal_snr
    )
    count = schedule.config.num_train_timesteps
    if settings.max_timestep > count:
        raise InputError(f"loss.max_timestep={settings.max_timestep}: the base has {count} timesteps, say at most that")
    snr = compute_snr(schedule, torch.arange(count))
    c = huber_delta(settings.huber_c, settings.huber_schedule, schedule.alphas_cumprod)
    return Objective(settings, schedule, _weights(settings, snr), c)


def min_snr_weights(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Loss weight per timestep: min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for v-prediction.

    Source: Hang et al. 2023, arXiv 2303.09556, equation 7."""
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction == "v_prediction" else clipped / snr


def debiased_weights(snr: Tensor, prediction: str) -> Tensor:
    """Loss weight per timestep: 1 / sqrt(snr) for epsilon (Yu et al. 2023, arXiv 2310.08442), snr being at most 1000.

    For v-prediction 1 / (snr + 1), and the bound, are those of kohya's sd-scripts (apply_debiased_estimation); the
    paper is about epsilon, and carried over to v its weight would be sqrt(snr) / (snr + 1)."""
    snr = snr.clamp(max=1000)
    return 1 / (snr + 1) if prediction == "v_prediction" else 1 / snr.sqrt()


def huber_delta(c: float, schedule: str, alphas_cumprod: Tensor) -> Tensor:
    """Where large errors begin, per timestep t of T: `constant` c, `exponential` c ** (t / T), `snr`
    (1 - c) / (1 + sigma) ** 2 + c with sigma ** 2 = (1 - alphas_cumprod) / alphas_cumprod.

    The last two fall from about 1 towards c where noise grows, so that there outliers pull less and fine detail is
    still learnt by squares. Source: Khrapov et al. 2024, arXiv 2403.16728; as in sd-scripts' --huber_schedule."""
    if schedule == "exponential":
        return c ** (torch.arange(len(alphas_cumprod)) / len(alphas_cumprod))
    if schedule == "snr":
        sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        return (1 - c) / (1 + sigma) ** 2 + c
    return torch.full_like(alphas_cumprod, c)


def elementwise_loss(kind: str, predicted: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """Error of every latent pixel, of the shape of `predicted` (B, 4, height, width), d being the difference:

    `l2` d ** 2, `l1` |d|, `huber` 2 c (sqrt(d ** 2 + c ** 2) - c), `smooth_l1` 2 (sqrt(d ** 2 + c ** 2) - c), with `c`
    (B,). Of small d huber is d ** 2 and smooth_l1 d ** 2 / c, of large ones they are 2 c |d| and 2 |d|.
    Source: Khrapov et al. 2024, arXiv 2403.16728; scaled as sd-scripts' --loss_type."""
    difference = predicted - target
    if kind == "l1":
        return difference.abs()
    squares = difference.square()
    if kind == "l2":
        return squares
    c = c.view(-1, 1, 1, 1)
    excess = squares / ((squares + c.square()).sqrt() + c)  # sqrt(d ** 2 + c ** 2) - c, without what cancels
    return 2 * c * excess if kind == "huber" else 2 * excess


def predict(unet: UNet2DConditionModel, asked: Objective, batch: Batch) -> Tensor:
    """What the UNet predicts of the noisy latents, of their shape and in the base's own precision."""
    noisy = asked.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    conditions = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    noisy = noisy.to(batch.tokens.dtype)  # the base's own, in which everything but the loss is computed
    return unet(noisy, batch.timesteps, batch.tokens, added_cond_kwargs=conditions, return_dict=False)[0]


def per_sample_loss(unet: UNet2DConditionModel, asked: Objective, batch: Batch, target: Tensor | None = None) -> Tensor:
    """The weighed mean error (B,) of the UNet's prediction, in float32.

    `target`, of the latents' shape, stands in for the noise or velocity that is there to be predicted.
    Masked pixels count as pixels, so that one pixel weighs as much in a small figure as in a large one."""
    predicted = predict(unet, asked, batch)
    if target is None:
        velocity = asked.settings.prediction == "v_prediction"
        schedule = asked.schedule
        target = schedule.get_velocity(batch.latents, batch.noise, batch.timesteps) if velocity else batch.noise
    errors = elementwise_loss(asked.settings.type, predicted.float(), target.float(), batch.huber_delta)
    if batch.mask is not None:
        errors = errors * batch.mask
    return errors.mean(dim=(1, 2, 3)) * batch.weights


def _weights(settings: Loss, snr: Tensor) -> Tensor:
    if settings.weighting == "min_snr":
        return min_snr_weights(snr, settings.snr_gamma, settings.prediction)
    if settings.weighting == "debiased":
        return debiased_weights(snr, settings.prediction)
    return torch.ones_like(snr)
