"""A base of another kind trains and samples through the same code: see tests/toy_base.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from toy_base import Euler, Flow, ToyBase, checkerboard, save_weights

from lora_lab.adapters.inject import lora_attached
from lora_lab.base.load import load_base
from lora_lab.base.sdxl import SDXL
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.sampling.generate import Request, generate
from lora_lab.training.loss import Batch, objective, per_sample_loss

CPU = torch.device("cpu")
TOY = (
    "model._target_=toy_base.ToyBase", "allow_targets=[toy_base]", "model.judge=null", "model.resolution=64",
    "adapter.target_modules='.*mlp.[02]'", "tracker=off", "device=cpu", "sampler.steps=8", "sampler.guidance=1",
)  # fmt: skip
PROMPT = "A HANA_TOFU"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the toy's weights and a data set of two images."""
    place = tmp_path_factory.mktemp("toy")
    save_weights(place / "toy.safetensors")
    (place / "images").mkdir()
    for name, colors in (("a", ("white", "orange")), ("b", ("white", "red"))):
        checkerboard(colors).save(place / "images" / f"{name}.png")
        (place / "images" / f"{name}.txt").write_text(f"{PROMPT}, {colors[1]}")
    return place


@pytest.fixture(scope="module")
def trained(place):
    """A run of 150 steps."""
    config = compose(
        "stage=train", "dataset=folder", f"dataset.root={place / 'images'}", "cache=null", "publish=false",
        f"model.base={place / 'toy.safetensors'}", *TOY, "steps=150", "lr=1e-2", "batch_size=4",
        "stage.prompts=['A {trigger}']", "stage.validate_every=0", "stage.save_dtype=fp32",
    )  # fmt: skip
    return run_stage(config, place / "run")


def base_of(place) -> ToyBase:
    return load_base(replace(compose(*TOY).model, base=str(place / "toy.safetensors")), CPU)


def sampled(base, requests, **changes):
    sampler = replace(compose(*TOY).sampler, **changes)
    return [np.asarray(image).astype(int) for image in generate(base, requests, sampler)]


def test_the_key_target_chooses_the_base(place):
    assert isinstance(base_of(place), ToyBase)
    assert isinstance(load_base(compose().model, CPU), SDXL)
    for name in ("toy_base.Missing", "no_such_module.Base", "nothing"):
        with pytest.raises(InputError, match=rf"model\._target_={name}: "):
            load_base(replace(compose().model, _target_=name), CPU)


def test_the_objective_is_the_flow_of_the_base(place):
    base = base_of(place)
    loss_objective = objective(compose("loss=plain").loss, base)
    latents, noise = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        latents=latents, noise=noise, timesteps=torch.tensor([99, 699]), conditioning={"text": torch.zeros(2, 32)},
        loss_weights=torch.ones(2), huber_delta=torch.ones(2),
    )  # fmt: skip
    time = torch.tensor([0.1, 0.7]).view(2, 1, 1, 1)
    predicted = base.network((1 - time) * latents + time * noise, time.flatten(), torch.zeros(2, 32))
    expected = (predicted - (noise - latents)).square().mean((1, 2, 3))
    assert torch.allclose(per_sample_loss(base.network, loss_objective, batch), expected, rtol=1e-5)
    weights = objective(compose("loss.snr_gamma=5").loss, base).loss_weights
    assert weights.isfinite().all() and weights[-1] == 0, "noise alone says nothing of the image"


def test_the_tensors_of_a_batch_make_the_same_batch():
    ones = torch.ones(2)
    batch = Batch(
        latents=ones, noise=ones, timesteps=ones, conditioning={"text": 2 * ones, "time_ids": 3 * ones},
        loss_weights=ones, huber_delta=ones, prior_weight=4 * ones,
    )  # fmt: skip
    tensors = batch.tensors()
    assert (
        torch.equal(tensors["conditioning.text"], 2 * ones) and "mask" not in tensors and "conditioning" not in tensors
    )
    again = Batch.from_tensors(tensors)
    assert again.tensors().keys() == tensors.keys() and again.conditioning.keys() == batch.conditioning.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in again.tensors().items())


def test_a_lora_of_it_learns_and_its_file_has_its_names(place, trained):
    losses = [json.loads(line)["loss"] for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-30:]) < 0.8 * np.mean(losses[:30])
    state = load_file(trained.lora)
    assert {key.partition(".")[0] for key in state} == {"lora_toy_mlp_0", "lora_toy_mlp_2"}
    with safe_open(trained.lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "toy/lora" and metadata["modelspec.prediction_type"] == "flow"
    assert "ss_base_model_version" not in metadata


def test_a_validation_image_is_what_its_file_samples(place, trained):
    base, request = base_of(place), Request(PROMPT, 0, (64, 64))
    (plain,) = sampled(base, [request])
    with lora_attached(base, Path(trained.lora)):
        (attached,) = sampled(base, [request])
    (shown,) = (np.asarray(Image.open(file)) for file in trained.samples["150"])
    assert np.array_equal(attached, shown) and np.abs(attached - plain).mean() > 5
    assert np.array_equal(sampled(base, [request])[0], plain), "what was attached is gone"


def test_text_and_photo_and_guidance_reach_its_images(place):
    base, photo = base_of(place), checkerboard(("blue", "green"))
    requests = [Request(PROMPT, 0, (64, 64)), Request("something else", 0, (64, 64))]
    requests += [Request(PROMPT, 0, (64, 64), photo, strength) for strength in (0.25, 1.0)]
    one, other, near, far = sampled(base, requests)
    assert not np.array_equal(one, other)
    apart = [np.abs(image - np.asarray(photo)).mean() for image in (near, far)]
    assert apart[0] < 0.7 * apart[1]
    assert not np.array_equal(sampled(base, requests[:1], guidance=5.0)[0], one)


def test_its_solver_ends_at_the_image_where_the_prediction_is_right():
    solver, flow = Euler(), Flow()
    solver.set_timesteps(4)
    image, noise = torch.randn(2, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sample = solver.add_noise(image, noise, solver.timesteps[:1])
    for timestep in solver.timesteps:
        sample = solver.step(flow.target(image, noise, timestep), timestep, sample)[0]
    assert torch.allclose(sample, image, atol=1e-5)
