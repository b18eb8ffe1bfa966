import pytest
import torch
from diffusers import DDPMScheduler

from lora_lab.training.loss import Batch, min_snr_weights, sample_losses


def test_min_snr_clips_what_is_easy_and_leaves_what_is_hard():
    snr = torch.tensor([0.1, 5.0, 50.0])
    assert torch.allclose(min_snr_weights(snr, 5.0), torch.tensor([1.0, 1.0, 0.1]))
    assert torch.equal(min_snr_weights(snr, None), torch.ones(3))


def test_min_snr_of_v_prediction_divides_by_one_more():
    snr = torch.tensor([1.0, 9.0])
    assert torch.allclose(min_snr_weights(snr, 5.0, "v_prediction"), torch.tensor([0.5, 0.5]))


class Knowing(torch.nn.Module):
    """A UNet that answers what it was told to."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, *_, **__):
        return (self.answer,)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_right_answer_costs_nothing_and_a_wrong_one_its_square(prediction):
    schedule = DDPMScheduler(prediction_type=prediction)
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([10, 500, 900])
    batch = Batch(latents, noise, timesteps, torch.zeros(3, 77, 8), torch.zeros(3, 8), torch.zeros(3, 6))
    target = noise if prediction == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
    assert torch.equal(sample_losses(Knowing(target), schedule, batch, 5.0), torch.zeros(3))
    off_by_two = sample_losses(Knowing(target + 2), schedule, batch, None)
    assert torch.allclose(off_by_two, torch.full((3,), 4.0), rtol=1e-5)
    snr = schedule.alphas_cumprod[timesteps] / (1 - schedule.alphas_cumprod[timesteps])
    assert torch.allclose(
        sample_losses(Knowing(target + 2), schedule, batch, 5.0), 4 * min_snr_weights(snr, 5.0, prediction), rtol=1e-4
    )
