"""What is minimised: the error of the network's prediction, weighted by how hard the timestep is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from lora_lab.base.protocol import BaseModel, Conditioning, NoiseSchedule
from lora_lab.errors import InputError
from lora_lab.settings.schema import Loss

CONDITIONING = "conditioning."  # begins the flat names of a batch's conditioning


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Everything that varies from step to step, as tensors on the device: B samples of one bucket, whose latents have C
    channels, height h and width w."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) integers
    conditioning: Conditioning  # each (B, ...); texts encoded, or as token ids where text encoders are trained
    loss_weights: Tensor  # (B,)
    huber_delta: Tensor  # (B,) where large errors begin
    mask: Tensor | None = None  # (B, 1, h, w) weights of the latents' errors; None weighs all alike
    prior_weight: Tensor | None = None  # () of the loss of a batch of the prior; None for a batch of the character

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by flat names, such as latents (B, C, h, w) and conditioning.prompt_embeds."""
        flat = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "conditioning"}
        flat |= {CONDITIONING + name: value for name, value in self.conditioning.items()}
        return {name: value for name, value in flat.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Batch":
        """The batch whose `tensors()` these are: latents (B, C, h, w) and so on."""
        conditioning = {
            name.removeprefix(CONDITIONING): value for name, value in tensors.items() if name.startswith(CONDITIONING)
        }
        others = {name: value for name, value in tensors.items() if not name.startswith(CONDITIONING)}
        return cls(**others, conditioning=conditioning)


@dataclass(frozen=True)
class Objective:
    """What the network is trained to predict: `settings` on the base's noise schedule.

    The tables are read while batches are made, so that a step computes with nothing but tensors of its batch."""

    settings: Loss  # resolved
    schedule: NoiseSchedule  # of the base
    predict: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]  # BaseModel.predict
    loss_weights: Tensor  # (T,) per timestep, on the CPU
    huber_delta: Tensor  # (T,), on the CPU


def objective(settings: Loss, base: BaseModel) -> Objective:
    """What `settings` mean for `base`. Raises InputError for settings that do not fit it."""
    settings = base.resolve_loss(settings)
    schedule = base.noise_schedule(settings)
    count = len(schedule.snr)
    if settings.max_timestep > count:
        raise InputError(f"loss.max_timestep={settings.max_timestep}: the base has {count} timesteps, use at most that")
    delta = huber_delta(settings.huber_c, settings.huber_schedule, schedule.sigmas)
    return Objective(settings, schedule, base.predict, _loss_weights(settings, schedule), delta)


def min_snr_weights(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Loss weight per timestep (T,) of `snr` (T,): min(snr, gamma) / snr for epsilon, min(snr, gamma) / (snr + 1) for
    v-prediction (Hang et al. 2023, arXiv 2303.09556, equation 7), min(snr, gamma) / (sqrt(snr) + 1) ** 2 for flow.

    Each is min(snr, gamma) for the error of the predicted image, carried over to the error of what is predicted."""
    clipped = snr.clamp(max=gamma)
    if prediction == "flow":
        return clipped / (snr.sqrt() + 1).square()
    return clipped / (snr + 1) if prediction == "v_prediction" else clipped / snr


def debiased_weights(snr: Tensor, prediction: str) -> Tensor:
    """Loss weight per timestep (T,) of `snr` (T,), which is clamped to 1000: 1 / sqrt(snr) for epsilon (Yu et al. 2023,
    arXiv 2310.08442).

    For v-prediction 1 / (snr + 1), and the bound, are those of kohya's sd-scripts (apply_debiased_estimation); the
    paper is about epsilon, and carried over to v its weight would be sqrt(snr) / (snr + 1). Raises InputError for
    other predictions."""
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"loss.weighting=debiased: is not defined for a base that predicts {prediction}")
    snr = snr.clamp(max=1000)
    return 1 / (snr + 1) if prediction == "v_prediction" else 1 / snr.sqrt()


def huber_delta(c: float, schedule: str, sigmas: Tensor) -> Tensor:
    """The error from which on errors count as large (T,), per timestep t of T: `constant` c, `exponential`
    c ** (t / T), `snr` (1 - c) / (1 + sigma) ** 2 + c with `sigmas` (T,).

    The last two fall from about 1 to c as noise grows: there outliers weigh less, and fine detail is still learnt with
    squared errors. Source: Khrapov et al. 2024, arXiv 2403.16728; as in sd-scripts' --huber_schedule."""
    if schedule == "exponential":
        return c ** (torch.arange(len(sigmas)) / len(sigmas))
    if schedule == "snr":
        return (1 - c) / (1 + sigmas) ** 2 + c
    return torch.full_like(sigmas, c)


def elementwise_loss(kind: str, predicted: Tensor, target: Tensor, delta: Tensor) -> Tensor:
    """Error of every latent, of the shape of `predicted` and `target` (B, C, h, w). With d their difference and c the
    `delta` (B,):

    `l2` d ** 2, `l1` |d|, `huber` 2 c (sqrt(d ** 2 + c ** 2) - c), `smooth_l1` 2 (sqrt(d ** 2 + c ** 2) - c).
    For small d huber is d ** 2 and smooth_l1 d ** 2 / c, for large d they are 2 c |d| and 2 |d|.
    Source: Khrapov et al. 2024, arXiv 2403.16728; scaled as sd-scripts' --loss_type."""
    difference = predicted - target
    if kind == "l1":
        return difference.abs()
    squares = difference.square()
    if kind == "l2":
        return squares
    c = delta.view(-1, 1, 1, 1)
    excess = squares / ((squares + c.square()).sqrt() + c)  # sqrt(d ** 2 + c ** 2) - c, without cancellation
    return 2 * c * excess if kind == "huber" else 2 * excess


def predict(network: nn.Module, objective: Objective, batch: Batch) -> Tensor:
    """What the network predicts from the noisy latents (B, C, h, w), in the base's precision."""
    noisy = objective.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
    return objective.predict(network, noisy, batch.timesteps, batch.conditioning)


def per_sample_loss(network: nn.Module, objective: Objective, batch: Batch, target: Tensor | None = None) -> Tensor:
    """The weighted mean error (B,) of the network's prediction, in float32.

    `target` (B, C, h, w) replaces what the noise schedule says is to be predicted.
    Masked latents count in the mean, so that a latent weighs as much in a small figure as in a large one."""
    predicted = predict(network, objective, batch)
    if target is None:
        target = objective.schedule.target(batch.latents, batch.noise, batch.timesteps)
    errors = elementwise_loss(objective.settings.type, predicted.float(), target.float(), batch.huber_delta)
    if batch.mask is not None:
        errors = errors * batch.mask
    return errors.mean(dim=(1, 2, 3)) * batch.loss_weights


def _loss_weights(settings: Loss, schedule: NoiseSchedule) -> Tensor:
    if settings.weighting == "min_snr":
        return min_snr_weights(schedule.snr, settings.snr_gamma, schedule.prediction)
    if settings.weighting == "debiased":
        return debiased_weights(schedule.snr, schedule.prediction)
    return torch.ones_like(schedule.snr)
