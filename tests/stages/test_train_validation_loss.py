"""The loss under fixed noise: measured right, comparable, and of no influence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import FAST, MEASURED, assert_same, cut_out, inside, train, validation

from lora_lab.base.encode import Cache, Encoder
from lora_lab.base.load import load_base
from lora_lab.demo import TOFU
from lora_lab.launch.config import compose
from lora_lab.training.data import encode_dataset
from lora_lab.training.randomness import generator
from lora_lab.training.resolve import resolve_training

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def measured(tmp_path_factory, pictures):
    """The three steps of `three_steps` with a measurement after each."""
    with inside(tmp_path_factory.mktemp("measured"), pictures) as folder:
        result = train("run", "steps=3", *MEASURED)
    assert result.validation_loss == validation(folder / "run")[3]
    return folder / "run"


def test_measuring_the_validation_loss_changes_nothing_that_is_learnt(measured, three_steps):
    assert_same(load_file(measured / "lora/HANA_TOFU.safetensors"), three_steps)


@pytest.mark.slow
def test_the_validation_loss_falls_and_is_taken_up_again_by_a_resumed_run(measured):
    whole = validation(measured)
    assert list(whole) == [0, 1, 2, 3] and whole[3] < whole[0]
    train("cut", "steps=2", *MEASURED)
    train("cut", "steps=3", *MEASURED, f"resume={Path('cut').absolute()}")
    assert validation("cut") == whole
    train("cut", "steps=3", *MEASURED, f"resume={Path('cut').absolute()}")
    assert validation("cut") == whole


@pytest.mark.slow
def test_validation_losses_of_runs_with_other_seeds_and_losses_can_be_compared(measured, tmp_path, capsys):
    """Before the first step, when every LoRA is still nothing, they are one number: that of the base."""
    start = validation(measured)[0]
    left = cut_out(tmp_path / "left", (0, 0, 64, 128))
    other = ("loss=huber", "loss.noise_offset=0.2", f"loss.mask={left}", "dataset.flip=true", "batch_size=4", "seed=9")
    train("other", "steps=1", *MEASURED, *other)
    assert validation("other")[0] == pytest.approx(start, rel=1e-5)
    assert "on the training images, which can be memorised" in capsys.readouterr().out
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for i in (6, 7):
        shutil.copy(TOFU / f"{i:02d}.png", held_out)
        (held_out / f"{i:02d}.txt").write_text("A tofu")
    train("held", "steps=1", *MEASURED, f"stage.validation_root={held_out}", "stage.validation_timesteps=[300]")
    assert f"on 2 images in {held_out}" in capsys.readouterr().out
    assert "validation" in json.loads(Path("held/manifest.json").read_text())["sha256"]
    train("elsewhere", "steps=1", *MEASURED, f"stage.validation_root={held_out}")
    assert len({round(validation(run)[0], 4) for run in ("other", "held", "elsewhere")}) == 3


def test_the_validation_loss_is_the_mean_error_of_the_prediction(measured):
    """Computed again from the base's files, for one picture at a time and at one timestep at a time."""
    training = resolve_training(compose(*FAST), Path("none"))
    base = load_base(training.model, training.device)
    pipe = base.pipe
    errors = []
    encoder = Encoder(base, training.device, Cache(None), offload=False)
    for example in encode_dataset(
        training.files.samples, training.images.crops, training.files.texts, False, encoder
    ).examples:
        view, text = example.crops[0][0], example.texts[0][0]
        for t in (300, 600, 900):
            noise = torch.randn(view.latents.shape, generator=generator("validation", example.name, t))
            kept = pipe.scheduler.alphas_cumprod[t]
            noisy = kept.sqrt() * view.latents + (1 - kept).sqrt() * noise
            conditions = {
                "text_embeds": text["pooled_prompt_embeds"][None],
                "time_ids": view.conditioning["time_ids"][None],
            }
            with torch.no_grad():
                predicted = pipe.unet(noisy[None], t, text["prompt_embeds"][None], added_cond_kwargs=conditions).sample
            errors.append((predicted[0] - noise).square().mean().item())
    assert validation(measured)[0] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
