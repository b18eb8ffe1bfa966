"""Latents and embeddings are those of diffusers' own pipeline."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from sdxl_structure import NARROW, pipeline

from lora_lab.base.sdxl import SDXL
from lora_lab.errors import RunError


@pytest.fixture(scope="module")
def pipe():
    return pipeline(NARROW)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_latents_have_an_eighth_of_the_side_and_are_scaled(pipe):
    latents = SDXL(pipe).encode_image(picture(64, 32), "a.png")
    assert latents.shape == (4, 4, 8) and latents.dtype == torch.float32
    pixels = torch.from_numpy(np.asarray(picture(64, 32))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(pixels).latent_dist.mean
    assert torch.allclose(latents, mean[0] * 0.13025, atol=1e-6)
    assert not torch.equal(latents, SDXL(pipe).encode_image(picture(64, 32, seed=1), "b.png"))


def test_a_float16_vae_that_overflows_is_upcast_temporarily(pipe):
    half = copy.deepcopy(pipe)
    half.vae.half()
    latents = SDXL(half).encode_image(picture(64, 64), "a.png")
    assert half.vae.dtype == torch.float16
    assert torch.allclose(latents, SDXL(pipe).encode_image(picture(64, 64), "a.png"), atol=2e-3)


def test_non_finite_latents_are_reported_with_the_image_s_name(pipe):
    broken = copy.deepcopy(pipe)
    with torch.no_grad():
        broken.vae.encoder.conv_in.bias.fill_(float("nan"))
    with pytest.raises(RunError, match=r"sub/두부\.png: .*model\.vae"):
        SDXL(broken).encode_image(picture(64, 64), "sub/두부.png")


def test_caption_embeddings_equal_the_pipeline_s_prompt_embeddings(pipe):
    for caption in ("A HANA_TOFU, smiling", "", "한국어 두부", "many words " * 99):
        (ours,) = SDXL(pipe).encode_texts([caption], torch.device("cpu"), offload=False)
        tokens, _, pooled, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
        embeds = ours["prompt_embeds"]
        assert embeds.shape == (77, 16 + 24) and ours["pooled_prompt_embeds"].shape == (24,)
        assert torch.equal(embeds, tokens[0]) and torch.equal(ours["pooled_prompt_embeds"], pooled[0])
        assert not embeds.requires_grad


def test_micro_conditioning_has_sdxl_s_order(pipe):
    sizes = (1000, 700), (10, 20), (1152, 896)  # height before width, top before left
    theirs = pipe._get_add_time_ids(*sizes, dtype=torch.float32, text_encoder_projection_dim=24)
    ours = SDXL(pipe).size_conditioning(*sizes)["time_ids"]
    assert torch.equal(ours, theirs[0]) and ours.tolist() == [1000, 700, 10, 20, 1152, 896]
