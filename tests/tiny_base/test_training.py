"""The data as the models get it, and a training that stops and goes on."""

import importlib
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from experiments.tiny_base import augment, models, tokenizers, train_controlnet, training
from experiments.tiny_base.data import FREE, FULL, HELD_OUT, WRONG, Pictures, prepare
from experiments.tiny_base.recipe import DRY, Training
from experiments.tiny_base.render import to_image
from experiments.tiny_base.train_vae import psnr
from experiments.tiny_base.training import fit, load, save
from lora_lab.images.edges import canny

AVATARS = Path(__file__).with_name("avatars.jsonl.xz")
TINY = replace(DRY, avatars=60, characters=60, details=5)
WAITS = {"tensor", "as_tensor", "new_tensor", "item", "tolist", "__bool__", "__int__", "__float__", "cpu", "nonzero"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prepare(folder / "data", TINY, AVATARS)
    return folder


@pytest.fixture(scope="module")
def pictures(work):
    return Pictures(work / "data", "cpu")


def test_tokens_are_the_captions(work, pictures):
    clip, blip = tokenizers.load(work / "data" / "tokenizers")
    index = torch.tensor([3, 100])
    for i in index:
        four = clip.batch_decode(pictures.clip[i, 0].long(), skip_special_tokens=True)
        full = blip.decode(pictures.blip[i, 0].long(), skip_special_tokens=True)
        assert "background" in four[FULL] and "background" in four[WRONG] and four[FULL] != four[WRONG]
        assert f"{four[FULL].partition(' background')[0].split()[-1]} background" in full
        assert all(four[i] for i in FREE)
    assert (pictures.blip[:, :, 0] == blip.bos_token_id).all(), "BLIP decodes from its own first token"


def test_tests_are_never_drawn_and_details_only_when_asked_for(pictures):
    torch.manual_seed(0)
    described = len(pictures.subjects)
    drawn, _ = pictures.draw(4000)
    assert not set(pictures.tests.tolist()) & set(drawn.tolist()) and drawn.max() < described
    assert len(pictures.tests) == described // HELD_OUT
    assert pictures.draw(4000, details=True)[0].max() >= described


def test_the_edges_of_a_picture_are_those_that_structure_canny_finds(work, pictures):
    few = torch.tensor([2, 5, 70])
    np.save(work / "data" / "edges.npy", np.stack([train_controlnet._edges(work / "data", int(i)) for i in few]))
    ground = torch.tensor([0, 2, 1])
    edges = train_controlnet.Edges(work, "cpu").of(torch.arange(3), ground)
    for i, seen in enumerate(pictures.rgb(few, ground)):
        expected = np.asarray(canny(to_image(seen), 100, 200)) / 255
        assert expected.any() and np.array_equal(edges[i].permute(1, 2, 0).numpy(), expected)


def test_the_controlnet_begins_as_the_unet_and_adds_nothing():
    unet, controlnet = models.unet().eval(), models.controlnet().eval()
    train_controlnet.start(controlnet, unet)
    assert torch.equal(controlnet.down_blocks[1].resnets[0].conv1.weight, unet.down_blocks[1].resnets[0].conv1.weight)
    told = {"encoder_hidden_states": torch.randn(1, 77, 256), "return_dict": False}
    told["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 128), "time_ids": torch.zeros(1, 6)}
    noisy, edges = torch.randn(1, 4, 32, 32), torch.ones(1, 3, 128, 128)
    with torch.no_grad():
        down, middle = controlnet(noisy, 500, controlnet_cond=edges, **told)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        assert torch.equal(unet(noisy, 500, **added, **told)[0], unet(noisy, 500, **told)[0])


def test_a_partner_shows_the_same_subject(pictures):
    index = torch.arange(len(pictures.subjects))
    assert (pictures.subjects[pictures.partner(index)] == pictures.subjects).all()
    assert (pictures.partner(index[:60]) == index[:60]).all(), "no two avatars are the same one"


def test_what_is_drawn_is_not_drawn_again(work):
    before = np.load(work / "data" / "pictures.npy", mmap_mode="r")[7].copy()
    prepare(work / "data", replace(TINY, characters=5), AVATARS)
    assert (np.load(work / "data" / "pictures.npy", mmap_mode="r")[7] == before).all()


@pytest.mark.parametrize("change", [augment.worn, augment.blurred, augment.noisy, augment.shaded, augment.compressed])
def test_wear_changes_pictures_but_not_what_they_show(change, pictures):
    torch.manual_seed(0)
    rgb = pictures.rgb(torch.arange(32), torch.zeros(32, dtype=torch.long))
    spoilt = change(rgb)
    wrong = (spoilt - rgb).square().mean((1, 2, 3))
    assert wrong.max() > 1e-4 and spoilt.shape == rgb.shape
    assert wrong.median() < 0.1


def test_psnr_is_of_all_pixels_together():
    originals = torch.zeros(2, 3, 8, 8)
    assert psnr(originals + 0.2, originals) == pytest.approx(20)
    one_of_two = torch.stack([originals[0], originals[1] + 0.2])
    assert psnr(one_of_two, originals) == pytest.approx(20 + 10 * math.log10(2))


@pytest.mark.slow
def test_a_training_cut_in_two_goes_on(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    lines = []

    def piece(until):
        layer = nn.Linear(4, 1)
        nn.init.zeros_(layer.weight)
        plan = Training(seconds=3.0, batch=256, rate=0.05, decay=0.9)
        done = fit(file, {"layer": layer}, lambda: (layer(x) - y).square().mean(), plan, until, lines.append)
        return done, layer

    file = tmp_path / "parts" / "line.safetensors"
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # the first one of a process imports a lot
    done, first = piece(time.time() + 1)
    spent = load(file, {"layer": nn.Linear(4, 1)})
    assert not done and 0 < spent["seconds"] < 3
    done, second = piece(time.time() + 60)
    assert done and load(file, {"layer": nn.Linear(4, 1)})["steps"] > spent["steps"]
    wrong = [((layer(x) - y).square().mean()).item() for layer in (first, second)]
    assert wrong[1] < wrong[0] and wrong[1] < 0.01
    steps = load(file, {"layer": nn.Linear(4, 1)})["steps"]
    assert piece(time.time() + 60)[0] and load(file, {"layer": nn.Linear(4, 1)})["steps"] == steps, "done is done"


def test_weights_are_kept_as_fp16_under_their_own_names(tmp_path):
    layer = nn.Linear(3, 2)
    save(tmp_path / "a.safetensors", {"layer": layer}, seconds=1.5, steps=7, psnr=30.0)
    other = nn.Linear(3, 2)
    assert load(tmp_path / "a.safetensors", {"layer": other}) == {"seconds": 1.5, "steps": 7, "notes": {"psnr": 30.0}}
    assert torch.equal(other.weight, layer.weight.half().float())


class NoWaiting(TorchFunctionMode):
    """Refuses what makes a CPU wait for a GPU or copies to it: a step with that can't be captured as a CUDA graph."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert getattr(function, "__name__", "") not in WAITS, f"a training step calls {function.__name__}"
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "unet", "blip", "clip"])
def test_no_training_step_waits_for_the_device(name, work, pictures, monkeypatch):
    module = importlib.import_module(f"experiments.tiny_base.train_{name}")
    if name == "unet":
        from experiments.tiny_base import models

        save(work / "parts" / "vae.safetensors", {"vae": models.vae()}, scaling_factor=1.0)

    def once(file, modules, loss, plan, until, log):
        loss().backward()  # the first call may set things up
        with NoWaiting():
            value = loss()
            value.backward()
        assert all(p.grad is not None for n, p in modules[file.stem].named_parameters() if "pooler" not in n)
        assert value.isfinite()
        return False

    monkeypatch.setattr(module, "fit", once)
    assert module.train(work, TINY, pictures, float("inf"), print) is False


def test_averages_forget_the_beginning():
    weight = nn.Parameter(torch.zeros(3))
    average = training.Average([weight], decay=0.99)
    for value in range(1, 400):
        weight.data.fill_(float(value))
        average.update()
    average.store()
    assert 350 < weight[0].item() < 370, "a tenth of the way behind, until that is a hundred steps"
