"""One function draws everything: a seed is a picture, whatever stands beside it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sdxl_structure import NARROW, pipeline

from lora_lab.base.load import load_base
from lora_lab.config import CONF, compose
from lora_lab.demo import PHOTOS
from lora_lab.errors import InputError
from lora_lab.generate import Request, check_strength, generate

CONFIG = compose("sampler.steps=4")
SAMPLER = CONFIG.sampler
PROMPT = "a cartoon yellow star with a green background"


@pytest.fixture(scope="module")
def pipe():
    return load_base(CONFIG.model, torch.device("cpu"))


def draw(pipe, *requests, sampler=SAMPLER):
    return [np.asarray(picture) for picture in generate(pipe, list(requests), sampler)]


def test_a_picture_is_its_seed_and_not_its_neighbours(pipe):
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((96, 64))
    first, again, other = (Request(PROMPT, seed, (64, 64)) for seed in (0, 0, 1))
    changed = Request(PROMPT, 2, (96, 64), photo, 0.8)
    alone = [draw(pipe, request)[0] for request in (first, changed)]
    together = draw(pipe, other, first, changed, again)
    assert np.array_equal(together[1], alone[0]) and np.array_equal(together[3], alone[0])
    assert np.array_equal(together[2], alone[1])
    assert np.abs(together[0].astype(int) - alone[0]).mean() > 1


def test_size_is_width_and_height_and_a_photo_keeps_its_own(pipe):
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((48, 80))
    drawn, changed = draw(
        pipe, Request(PROMPT, 0, (96, 64)), Request(PROMPT, 0, (128, 128), photo, 0.5)
    )  # the photo decides, not the size
    assert drawn.shape == (64, 96, 3)
    assert changed.shape == (80, 48, 3)


def test_strength_is_how_far_the_picture_leaves_the_photo(pipe):
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((128, 128))
    apart = [
        np.abs(draw(pipe, Request(PROMPT, 0, photo.size, photo, strength))[0].astype(int) - np.asarray(photo)).mean()
        for strength in (0.25, 1.0)
    ]
    assert apart[0] < apart[1] / 2


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "sampler").glob("*.yaml")))
def test_every_sampler_draws_what_the_prompt_asks(pipe, name):
    sampler = replace(compose(f"sampler={name}").sampler, steps=8)
    (drawn,) = draw(pipe, Request(PROMPT, 0, (128, 128)), sampler=sampler)
    red, green, blue = drawn[:16, :16].reshape(-1, 3).mean(axis=0)
    assert green > max(red, blue) + 20
    assert drawn.std() > 20
    photo = Image.fromarray(drawn)
    assert draw(pipe, Request(PROMPT, 0, photo.size, photo, 0.5), sampler=sampler)[0].std() > 20


def test_the_negative_prompt_leads_away_and_only_with_guidance(pipe):
    request = Request(PROMPT, 0, (64, 64))
    away = replace(SAMPLER, negative_prompt="a green background")
    assert not np.array_equal(draw(pipe, request)[0], draw(pipe, request, sampler=away)[0])
    plain, unguided = (replace(sampler, guidance=1.0) for sampler in (SAMPLER, away))
    assert np.array_equal(draw(pipe, request, sampler=plain)[0], draw(pipe, request, sampler=unguided)[0])


def test_drawing_leaves_the_base_as_it_was(pipe):
    scheduler = pipe.scheduler
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    draw(pipe, Request(PROMPT, 0, (64, 64)), sampler=replace(compose("sampler=ddim").sampler, steps=2))
    assert pipe.scheduler is scheduler
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


def test_a_float16_vae_that_overflows_is_lifted_for_the_while():
    pipe = pipeline(NARROW)
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((64, 64))
    requests = Request("a star", 0, (64, 64)), Request("a star", 0, (64, 64), photo, 0.5)
    exact = draw(pipe, *requests)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.half()
    for ours, theirs in zip(draw(pipe, *requests), exact, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 3
    assert pipe.vae.dtype == torch.float16


def test_a_strength_that_leaves_no_step_says_what_would_do(pipe):
    photo = Image.new("RGB", (64, 64))
    with pytest.raises(InputError, match=r"stage\.strength=0\.2 with sampler\.steps=4 .*at least 0\.25 or more steps"):
        draw(pipe, Request(PROMPT, 0, (64, 64), photo, 0.2))
    for steps in range(1, 120):  # the strength that the message names does do
        with pytest.raises(InputError) as caught:
            check_strength(steps, 0.5 / steps)
        named = float(str(caught.value).split("at least ")[1].split()[0])
        check_strength(steps, named)
