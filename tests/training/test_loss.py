"""The objective and the losses, compared with the papers' formulas worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_lab.base.sdxl import SDXL
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.training.loss import (
    Batch,
    debiased_weights,
    elementwise_loss,
    huber_delta,
    min_snr_weights,
    objective,
    per_sample_loss,
)

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TIMESTEPS = torch.tensor([10, 500, 900])


def objective_of(*overrides, **scheduler):
    pipe = SimpleNamespace(scheduler=SimpleNamespace(config=SCHEDULER | scheduler))
    return objective(compose("stage=train", *overrides).loss, SDXL(pipe))


class Knowing(torch.nn.Module):
    """A UNet that answers what it was told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, *_, **__):
        return (self.answer,)


def batch_of(objective, **changes):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    parts = dict(
        latents=latents,
        noise=noise,
        timesteps=TIMESTEPS,
        conditioning={
            "prompt_embeds": torch.zeros(3, 77, 8),
            "pooled_prompt_embeds": torch.zeros(3, 8),
            "time_ids": torch.zeros(3, 6),
        },
        loss_weights=objective.loss_weights[TIMESTEPS],
        huber_delta=objective.huber_delta[TIMESTEPS],
        mask=None,
    )
    return Batch(**parts | changes)


def target_of(objective, batch):
    """What the UNet should say, from the definitions (Ho et al. 2020; Salimans and Ho 2022)."""
    if objective.schedule.prediction == "epsilon":
        return batch.noise
    kept = objective.schedule.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    return kept.sqrt() * batch.noise - (1 - kept).sqrt() * batch.latents


def test_min_snr_lowers_only_the_weights_of_clear_timesteps():
    snr = torch.tensor([0.1, 5.0, 50.0])
    assert torch.allclose(min_snr_weights(snr, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.1]))


def test_min_snr_of_v_prediction_divides_by_one_more():
    snr = torch.tensor([1.0, 9.0])
    assert torch.allclose(min_snr_weights(snr, 5.0, "v_prediction"), torch.tensor([0.5, 0.5]))


def test_min_snr_of_a_flow_gives_the_same_weight_to_the_predicted_image():
    """x = noisy - t v, so an error of v is one of x divided by t; snr = ((1 - t) / t) ** 2."""
    t = torch.tensor([0.25, 0.5, 0.9])
    snr = ((1 - t) / t).square()
    assert torch.allclose(min_snr_weights(snr, 5.0, "flow"), snr.clamp(max=5) * t.square())
    with pytest.raises(InputError, match=r"loss\.weighting=debiased: is not defined for a base that predicts flow"):
        debiased_weights(snr, "flow")


def test_debiased_is_one_over_the_root_of_the_snr_and_of_v_prediction_over_one_more():
    snr = torch.tensor([0.25, 4.0, 1000.0, 1e9])
    assert torch.allclose(debiased_weights(snr, "epsilon"), torch.tensor([2.0, 0.5, 0.0316228, 0.0316228]))
    assert torch.allclose(debiased_weights(snr, "v_prediction"), torch.tensor([0.8, 0.2, 1 / 1001, 1 / 1001]))


def test_huber_c_falls_from_one_to_c_where_noise_grows():
    sigmas = torch.tensor([0.0, 1.0, 2.0, torch.inf])
    assert torch.allclose(huber_delta(0.1, "constant", sigmas), torch.full((4,), 0.1))
    assert torch.allclose(huber_delta(0.1, "snr", sigmas), torch.tensor([1.0, 0.9 / 4 + 0.1, 0.9 / 9 + 0.1, 0.1]))
    assert torch.allclose(huber_delta(0.0001, "exponential", sigmas), torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_elementwise_losses_of_known_differences():
    right, wrong = torch.zeros(2, 1, 1, 1), torch.tensor([3.0, -0.75]).view(2, 1, 1, 1)
    c = torch.tensor([4.0, 1.0])  # hypotenuses 5 and 1.25
    expected = {"l2": [9, 0.5625], "l1": [3, 0.75], "huber": [2 * 4 * (5 - 4), 2 * 0.25], "smooth_l1": [2, 0.5]}
    for kind, errors in expected.items():
        assert torch.allclose(elementwise_loss(kind, wrong, right, c).flatten(), torch.tensor(errors).float()), kind


def test_huber_is_quadratic_for_small_and_linear_for_large_errors():
    c, right = torch.full((1,), 0.1), torch.zeros(1, 1, 1, 1)
    errors = [elementwise_loss("huber", right + d, right, c).item() for d in (1e-4, 100.0, 200.0)]
    assert errors[0] == pytest.approx(1e-8, rel=1e-4)
    assert errors[2] - errors[1] == pytest.approx(2 * 0.1 * 100, rel=1e-3)


def test_loss_weights_follow_the_noise_schedule_of_the_base():
    kept = DDPMScheduler(**SCHEDULER).alphas_cumprod.double()
    snr = kept / (1 - kept)
    expected = {
        "loss=plain": torch.ones(1000),
        "loss.snr_gamma=2": snr.clamp(max=2) / snr,
        "loss=debiased": 1 / snr.clamp(max=1000).sqrt(),
    }
    for override, weights in expected.items():
        assert torch.allclose(objective_of(override).loss_weights.double(), weights.double(), rtol=1e-4), override


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_0_for_the_target_and_squared_otherwise(prediction):
    loss_objective = objective_of("loss.snr_gamma=0.5", prediction_type=prediction)
    batch = batch_of(loss_objective)
    right = target_of(loss_objective, batch)
    assert torch.allclose(per_sample_loss(Knowing(right), loss_objective, batch), torch.zeros(3), atol=1e-10)
    off_by_two = per_sample_loss(Knowing(right + 2), loss_objective, batch)
    assert torch.allclose(off_by_two, 4 * batch.loss_weights, rtol=1e-4) and batch.loss_weights.min() < 0.1


def test_the_prediction_is_that_of_the_base_unless_set():
    assert objective_of().settings.prediction == "epsilon"
    assert objective_of(prediction_type="v_prediction").settings.prediction == "v_prediction"
    for base in ("epsilon", "v_prediction"):
        loss_objective = objective_of("loss.prediction=v_prediction", prediction_type=base)
        batch = batch_of(loss_objective)
        assert torch.allclose(
            per_sample_loss(Knowing(target_of(loss_objective, batch)), loss_objective, batch),
            torch.zeros(3),
            atol=1e-10,
        )
        snr = loss_objective.schedule.alphas_cumprod / (1 - loss_objective.schedule.alphas_cumprod)
        assert torch.allclose(loss_objective.loss_weights, snr.clamp(max=5) / (snr + 1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["l1", "huber", "smooth_l1"])
def test_other_loss_types_use_delta_and_weight_of_the_timestep(kind):
    loss_objective = objective_of(
        "loss.snr_gamma=0.5", f"loss.type={kind}", "loss.huber_c=0.3", "loss.huber_schedule=exponential"
    )
    batch = batch_of(loss_objective)
    assert torch.allclose(batch.huber_delta, 0.3 ** (TIMESTEPS / 1000))
    distances = (4 + batch.huber_delta**2).sqrt() - batch.huber_delta  # of errors of 2
    scaled = 2 * batch.huber_delta * distances
    expected = {"l1": torch.full((3,), 2.0), "huber": scaled, "smooth_l1": 2 * distances}[kind]
    losses = per_sample_loss(Knowing(batch.noise + 2), loss_objective, batch)
    assert torch.allclose(losses, expected * batch.loss_weights, rtol=1e-4)


def test_a_mask_removes_errors_and_keeps_the_weight_of_a_latent():
    loss_objective = objective_of("loss=plain")
    mask = torch.ones(3, 1, 8, 8)
    mask[0, :, :, :6], mask[1, :, :2] = 0, 0.5
    batch = batch_of(loss_objective, mask=mask)
    wrong = batch.noise + 2
    wrong[0, :, :, :6] += 100  # where nothing is learnt
    expected = torch.tensor([4 * 2 / 8, 4 * (6 + 0.5 * 2) / 8, 4])
    assert torch.allclose(per_sample_loss(Knowing(wrong), loss_objective, batch), expected, rtol=1e-4)


def test_a_timestep_beyond_the_base_is_refused():
    with pytest.raises(InputError, match=r"loss\.max_timestep=1000: the base has 100 timesteps"):
        objective_of(num_train_timesteps=100)
    assert len(objective_of("loss.max_timestep=100", num_train_timesteps=100).loss_weights) == 100


def test_zero_terminal_snr_ends_in_pure_noise():
    """Lin et al. 2023, algorithm 1: shift the roots of alpha-bar so that the last is 0, scale the first back."""
    roots = DDPMScheduler(**SCHEDULER).alphas_cumprod.double().sqrt()
    expected = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    loss_objective = objective_of("loss=zero_snr")
    assert torch.allclose(loss_objective.schedule.alphas_cumprod.double().sqrt(), expected, atol=1e-5)
    assert loss_objective.schedule.alphas_cumprod[-1] == 0 and loss_objective.loss_weights.isfinite().all()
    batch = batch_of(loss_objective, timesteps=torch.tensor([999, 999, 999]))
    velocity = -batch.latents  # of noise alone
    assert torch.allclose(per_sample_loss(Knowing(velocity), loss_objective, batch), torch.zeros(3), atol=1e-10)
    assert objective_of(prediction_type="v_prediction", rescale_betas_zero_snr=True).schedule.alphas_cumprod[-1] == 0
    off = objective_of("loss.zero_terminal_snr=false", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert off.schedule.alphas_cumprod[-1] > 0.004


@pytest.mark.parametrize("mask", [None, torch.ones(3, 1, 8, 8)], ids=["all", "masked"])
@pytest.mark.parametrize("overrides", [(), ("loss=huber",), ("loss=zero_snr", "loss.type=l1")])
def test_a_step_does_not_wait_for_the_device(overrides, mask):
    """Tensors that have no values: whatever asks for one (item, if, indexing by a mask) fails as a CUDA graph would."""
    loss_objective = objective_of(*overrides)
    batch = batch_of(loss_objective, mask=mask)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = Batch.from_tensors({name: mode.from_tensor(value) for name, value in batch.tensors().items()})
        losses = per_sample_loss(Knowing(fake.noise + 1), loss_objective, fake)
    assert losses.shape == (3,)
