"""Every option changes what is learnt, and what an average, a rate of its own or an adapter's options do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_runs import assert_same, checkpointed, lora, metrics, train

from lora_lab.errors import InputError
from lora_lab.training.checkpoint import checkpoints

pytestmark = pytest.mark.usefixtures("elsewhere")


def in_the_file(key: str) -> str:
    """What a LoRA file calls a B matrix of a checkpoint."""
    layer = key.removeprefix("unet.").removesuffix(".lora_B.default.weight").replace(".", "_")
    return f"lora_unet_{layer}.lora_up.weight"


CHANGES = [
    "seed=1", "lr=2e-3", "loss.snr_gamma=0.01", "loss=zero_snr", "stage.caption_dropout=1.0", "dataset.flip=true",
    "dataset.shuffle_captions=true", "dataset.caption_prefix='a drawing of'", "dataset.caption_suffix=', flat'",
    "schedule.warmup=2", "schedule=cosine", "adapter.lora_alpha=2", "adapter.lora_dropout=0.5",
    "stage.max_grad_norm=0.001", "optimizer.weight_decay=0.5", "optimizer=adamw8bit", "targets=ff",
]  # fmt: skip
CHANGES_TRIED_ELSEWHERE = [  # without a whole run: test_kinds.py, test_optimizers.py, test_loss.py
    "loss=huber", "loss.noise_offset=0.1", "optimizer=lion8bit", "optimizer=adafactor", "optimizer=schedule_free",
    "targets=all", "adapter.target_modules=.*attn2.*to_q", "adapter.rank_pattern={to_q: 2}",
    "adapter.alpha_pattern={to_q: 1}", "adapter=rslora", "adapter=dora", "adapter=pissa", "adapter=loha",
    "adapter=lokr", "stage.lora_plus_ratio=16",
]  # fmt: skip


@pytest.mark.parametrize(
    "change", [*CHANGES, *(pytest.param(change, marks=pytest.mark.slow) for change in CHANGES_TRIED_ELSEWHERE)]
)
def test_an_option_changes_what_is_learnt(change, three_steps):
    train("changed", "steps=3", change)
    plain, changed = three_steps, lora("changed")
    assert plain.keys() != changed.keys() or any(not torch.equal(plain[key], changed[key]) for key in plain)


def test_prodigys_own_rate_is_what_is_logged_and_shown(capsys):
    train("run", "steps=6", "optimizer=prodigy", "optimizer.d0=1e-3", "optimizer.d_coef=10")  # to grow early
    assert "Prodigy with its own lr, 1; lr=0.001 is not used" in capsys.readouterr().out
    rates = [line["lr"] for line in metrics("run")]
    assert rates[0] == 1e-3 and rates == sorted(rates) and rates[-1] > 1e-3
    with safe_open("run/lora/HANA_TOFU.safetensors", "pt") as file:
        assert file.metadata()["ss_learning_rate"] == "1.0"


def test_the_average_of_a_schedule_free_optimizer_is_what_is_saved():
    train("run", "steps=3", "optimizer=schedule_free")
    walking = checkpointed("run/checkpoints/step-000003")
    saved = {key: value for key, value in lora("run").items() if not key.endswith(".alpha")}
    key = next(key for key in walking if "lora_B" in key)
    name = in_the_file(key)
    average, last = saved[name], walking[key]
    assert not torch.equal(average, last)
    assert average.norm() < last.norm()  # it began at zero, and the average comes after


def test_the_average_over_the_steps_is_saved_and_drawn_and_the_checkpoint_has_both(three_steps):
    train("run", "steps=3", "stage.ema_decay=0.99", "stage.checkpoint_every=1", "stage.keep_checkpoints=9")
    steps = [checkpointed(c) for c in checkpoints(Path("run"))]
    saved = lora("run")
    for key in (key for key in steps[0] if "lora_B" in key):
        name = in_the_file(key)
        average = torch.zeros_like(saved[name])  # as every LoRA begins
        for n, weights in enumerate(steps):
            average = average.lerp(weights[key], 1 - (1 + n) / (10 + n))
        assert torch.allclose(saved[name], average, atol=1e-7)
        assert torch.equal(steps[-1][key], three_steps[name])  # training itself is the one without
    train("plain", "steps=3")
    drawn, plain = (np.asarray(Image.open(f"{run}/samples/step-000003/p0-s0.png")) for run in ("run", "plain"))
    assert not np.array_equal(drawn, plain)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "pissa", "loha", "lokr"])
def test_an_option_of_an_adapter_changes_what_is_learnt(adapter):
    asked = ("steps=1", f"adapter={adapter}", "targets=ff" if adapter == "pissa" else "targets=all")
    train("plain", *asked)
    changes = {
        "dora": ["adapter.use_rslora=true", "adapter.alpha_pattern={to_q: 1}"],
        "pissa": ["adapter.init_lora_weights=pissa_niter_1", "adapter.lora_dropout=0.5"],
        "loha": ["adapter.alpha=2", "adapter.rank_dropout=0.5", "adapter.use_effective_conv2d=true"],
        "lokr": ["adapter.decompose_factor=2", "adapter.decompose_both=true", "adapter.init_weights=lycoris"],
    }
    for i, change in enumerate(changes[adapter]):
        train(f"{i}", *asked, change)
        plain, changed = lora("plain"), lora(f"{i}")
        same = plain.keys() == changed.keys() and all(
            plain[key].shape == changed[key].shape and torch.equal(plain[key], changed[key]) for key in plain
        )
        assert not same, change


def test_lora_plus_lets_b_learn_faster_and_leaves_a(three_steps):
    """A's gradient is zero in the first step, since B is; after it A stands still, and B is 16 times as far."""
    train("one", "steps=1", "optimizer.weight_decay=0")
    train("plus", "steps=1", "optimizer.weight_decay=0", "stage.lora_plus_ratio=16")
    one, plus = lora("one"), lora("plus")
    for key in one:
        times = 16 if key.endswith("lora_up.weight") else 1
        assert torch.allclose(plus[key], times * one[key], rtol=1e-4), key
    notes = metadata_of("plus")
    assert json.loads(notes["ss_network_args"]) == {"loraplus_lr_ratio": "16.0"}
    with pytest.raises(InputError, match="only LoRA and DoRA"):
        train("loha", "steps=1", "adapter=loha", "stage.lora_plus_ratio=16")


def metadata_of(folder):
    with safe_open(f"{folder}/lora/HANA_TOFU.safetensors", "pt") as file:
        return file.metadata()


@pytest.mark.slow
def test_training_starts_from_a_lora_file_and_goes_on_only_with_that(three_steps, uninterrupted):
    """One step with a learning rate of next to nothing leaves what the file holds."""
    file = Path(uninterrupted, "lora", "HANA_TOFU.safetensors")
    train("run", "steps=1", "lr=1e-12", f"stage.start_from={file}", "optimizer.weight_decay=0")
    for key, value in lora(uninterrupted).items():
        assert torch.allclose(lora("run")[key], value, atol=1e-9), key
    train("more", "steps=2", f"stage.start_from={file}")
    whole = lora("more")
    train("cut", "steps=1", f"stage.start_from={file}")
    goes_on = ("steps=2", f"resume={Path('cut').absolute()}")
    with pytest.raises(InputError, match="start"):
        train("cut", *goes_on, f"stage.start_from={Path(uninterrupted, 'lora', 'HANA_TOFU-000010.safetensors')}")
    with pytest.raises(InputError, match="start"):
        train("cut", *goes_on)
    train("cut", *goes_on, f"stage.start_from={file}")
    assert_same(lora("cut"), whole)


def test_a_file_that_training_cannot_start_from_is_refused(uninterrupted):
    with pytest.raises(InputError, match=r"stage\.start_from=nothing: no such file"):
        train("run", "steps=1", "stage.start_from=nothing")
    with pytest.raises(InputError, match=r"holds LoRA of rank 4 in \d+ layers, but this run trains LoRA of rank 8 in"):
        train("rank", "steps=1", "rank=8", f"stage.start_from={uninterrupted}")
    with pytest.raises(InputError, match="PiSSA starts from the base's weights"):
        train("pissa", "steps=1", "adapter=pissa", f"stage.start_from={uninterrupted}")
