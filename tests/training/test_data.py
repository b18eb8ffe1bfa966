"""Images and masks are processed alike, and a batch follows its options."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lora_lab.base.sdxl import SDXL
from lora_lab.images.dataset import Sample, find_masks
from lora_lab.launch.config import compose
from lora_lab.training.data import Example, TrainingData, View, fit_pictures, latent_mask
from lora_lab.training.loss import objective

BASE = SDXL(SimpleNamespace(scheduler=SimpleNamespace(config={})))


def text_of(number):
    """What SDXL's text encoders would give, all of one number."""
    return {"prompt_embeds": torch.full((77, 8), number), "pooled_prompt_embeds": torch.full((8,), number)}


TEXT = text_of(0.0)


def batches(masks, *overrides, count=8):
    """Batches of two of four examples, whose latents are 0 upright and 1 mirrored."""
    views = [View(torch.full((4, 2, 2), float(i)), mask, {"time_ids": torch.zeros(6)}) for i, mask in enumerate(masks)]
    data = TrainingData([Example("0.png", [views], [[TEXT]])] * 4, TEXT, [[0, 1, 2, 3]])
    loss_objective = objective(compose(*overrides).loss, BASE)
    return [
        data.batch(seed=0, step=step, part=0, parts=1, batch_size=2, objective=loss_objective, caption_dropout=0.0)
        for step in range(count)
    ]


def test_a_mask_is_cropped_and_scaled_like_its_image(tmp_path):
    (tmp_path / "masks").mkdir()
    samples = []
    for i, (size, white) in enumerate([((301, 97), (150, 0, 180, 50)), ((90, 200), (0, 99, 90, 200))]):
        drawing = Image.new("L", size)
        drawing.paste(255, white)
        drawing.save(tmp_path / "masks" / f"{i}.png")
        drawing.convert("RGB").save(tmp_path / f"{i}.png")
        samples.append(Sample(f"{i}.png", tmp_path / f"{i}.png", ("",)))
    for fitted in fit_pictures(samples, 128, 16, find_masks(str(tmp_path / "masks"))):
        picture, mask = np.asarray(fitted.picture.convert("L")), np.asarray(fitted.mask)
        assert picture.shape == mask.shape and 0.05 < mask.mean() / 255 < 0.95
        assert np.abs(picture.astype(int) - mask).mean() < 4, "they differ at the edges only, by the resampling"
    assert all(fitted.mask is None for fitted in fit_pictures(samples, 128, 16, None))


def test_the_weight_of_a_latent_is_the_mean_of_its_64_pixels():
    mask = Image.new("L", (24, 16))
    mask.paste(255, (0, 0, 12, 16))  # one column and a half
    mask.putpixel((20, 15), 51)
    expected = torch.tensor([[1, 0.5, 0], [1, 0.5, 0.2 / 64]])
    assert torch.allclose(latent_mask(mask, 2, 3), expected[None])


def test_a_mirrored_image_has_a_mirrored_mask():
    upright = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    found = set()
    for batch in batches([upright, upright.flip(-1)]):
        for latents, mask in zip(batch.latents, batch.mask, strict=True):
            mirrored = bool(latents.any())
            assert torch.equal(mask, upright.flip(-1) if mirrored else upright)
            found.add(mirrored)
    assert found == {False, True}


def test_outside_of_the_mask_the_unmasked_weight_applies():
    mask = torch.tensor([[[1.0, 0.0], [0.5, 0.0]]])
    for weight, expected in ((0.0, mask), (0.2, torch.tensor([[[1.0, 0.2], [0.6, 0.2]]])), (1.0, torch.ones(1, 2, 2))):
        (batch,) = batches([mask, mask], f"loss.unmasked_weight={weight}", count=1)
        assert torch.allclose(batch.mask, expected.expand(2, 1, 2, 2))
    assert batches([None, None], count=1)[0].mask is None


@pytest.mark.parametrize("override", ["loss=plain", "loss=debiased", "loss.huber_c=0.5", "loss=zero_snr"])
def test_a_sample_has_the_weight_and_delta_of_its_timestep(override):
    loss_objective = objective(compose(override).loss, BASE)
    for batch in batches([None, None], override):
        assert torch.equal(batch.loss_weights, loss_objective.loss_weights[batch.timesteps])
        assert torch.equal(batch.huber_delta, loss_objective.huber_delta[batch.timesteps])


def test_a_sample_uses_one_crop_and_one_order_of_one_caption():
    """Latents, mask and coordinates of the same crop; in time every crop with every text."""
    crops = [
        [
            View(torch.full((4, 2, 2), n), torch.full((1, 2, 2), n / 10), {"time_ids": torch.full((6,), n)})
            for n in (i, i + 0.5)
        ]
        for i in (0.0, 1.0, 2.0)
    ]
    texts = [[text_of(n) for n in orders] for orders in ([1.0, 2.0], [3.0])]
    data = TrainingData([Example("0.png", crops, texts)], TEXT, [[0]])
    loss_objective, seen = objective(compose().loss, BASE), []
    for step in range(150):
        batch = data.batch(
            seed=0, step=step, part=0, parts=1, batch_size=2, objective=loss_objective, caption_dropout=0.0
        )
        for i in range(2):
            conditioning = batch.conditioning
            latents, text = batch.latents[i].mean().item(), conditioning["prompt_embeds"][i].mean().item()
            assert batch.mask[i].mean().item() == pytest.approx(latents / 10)
            assert conditioning["time_ids"][i].mean().item() == latents
            assert conditioning["pooled_prompt_embeds"][i].mean().item() == text
            seen.append((latents, text))
    assert len(set(seen)) == 18
    assert abs([text for _, text in seen].count(3.0) - 150) < 30, "a caption of few orders is read as often as others"
