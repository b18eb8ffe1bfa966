"""The steps themselves: they learn, accumulate, save memory, and stop at numbers that are none."""

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import FAST, NOISE, checkpointed, encoded, lora, metrics, train

from lora_lab.adapters.inject import lora_attached
from lora_lab.demo import TOFU
from lora_lab.errors import RunError
from lora_lab.launch.config import compose
from lora_lab.training import engine
from lora_lab.training.lora_training import LoRATraining, checkpoints
from lora_lab.training.loss import objective, per_sample_loss

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_the_loss_of_known_noise_falls(uninterrupted):
    """20 steps are few, but the trained LoRA must beat the base on the very batches that it saw."""
    _, data, base = encoded()
    loss_objective = objective(compose(*FAST).loss, base)

    def loss() -> float:
        batches = (
            data.batch(seed=0, step=s, part=0, parts=1, batch_size=2, objective=loss_objective, caption_dropout=0.0)
            for s in range(20)
        )
        with torch.no_grad():
            return sum(per_sample_loss(base.network, loss_objective, batch).mean().item() for batch in batches) / 20

    before = loss()
    with lora_attached(base, Path(uninterrupted, "lora", "HANA_TOFU.safetensors")):
        after = loss()
    assert after < before * 0.97


@pytest.mark.slow
def test_two_half_batches_accumulated_equal_one_whole(tmp_path):
    """Sample i of a step draws the same noise in one batch or two; with one picture the order does not matter."""
    one = tmp_path / "one"
    one.mkdir()
    (one / "00.png").write_bytes((TOFU / "00.png").read_bytes())
    (one / "00.txt").write_text("A HANA_TOFU smiling")
    data = (f"dataset.root={one}", "steps=3", *NOISE.split())
    train("whole", *data, "batch_size=4")
    train("halves", *data, "batch_size=2", "stage.gradient_accumulation=2")
    whole, halves = lora("whole"), lora("halves")
    for key in whole:
        assert torch.allclose(whole[key], halves[key], atol=2e-5), key


@pytest.mark.slow
def test_gradient_checkpointing_and_offload_change_nothing():
    train("fast", "steps=3", "memory=fast")
    train("balanced", "steps=3", "memory=balanced", "stage.validate_every=1")
    fast, balanced = lora("fast"), lora("balanced")
    for key in fast:
        assert torch.allclose(fast[key], balanced[key], atol=1e-6), key


@pytest.mark.slow
def test_with_offload_the_unet_goes_to_the_device_when_all_is_encoded(monkeypatch):
    arrived, to, device = [], torch.nn.Module.to, torch.device("cpu:0")  # the CPU, told apart by name

    def watched(self, *arguments, **settings):
        if device in arguments:
            arrived.append(type(self).__name__)
        return to(self, *arguments, **settings)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    train("run", "steps=1", "memory=balanced", "device='cpu:0'", "cache=cache")
    turns = ["CLIPTextModel", "CLIPTextModelWithProjection", "AutoencoderKL", "UNet2DConditionModel"]
    assert [name for name in arrived if name in turns][:4] == turns


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(monkeypatch):
    real = engine.per_sample_loss
    calls = []

    def sometimes_nan(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(engine, "per_sample_loss", sometimes_nan)
    with pytest.raises(RunError, match=r"step 4 is nan, at 0\d\.png, 0\d\.png: "):
        train("run", "steps=6", "stage.checkpoint_every=2")
    state = checkpointed(checkpoints(Path("run"))[-1])
    assert checkpoints(Path("run"))[-1].name == "step-000002"
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.slow
@pytest.mark.parametrize("at", [pytest.param(4, id="between"), pytest.param(6, id="last step")])
def test_an_infinite_gradient_of_a_finite_loss_stops_the_run_before_anything_is_written(at, monkeypatch):
    real = engine.per_sample_loss
    calls = []

    def sometimes_steep(*arguments):
        calls.append(1)
        losses = real(*arguments)
        if len(calls) == at:
            losses.register_hook(lambda gradient: gradient * math.inf)
        return losses

    monkeypatch.setattr(engine, "per_sample_loss", sometimes_steep)
    with pytest.raises(RunError, match=rf"gradient norm of step {at} is (inf|nan), at 0\d\.png, 0\d\.png: "):
        train("run", "steps=6", "stage.checkpoint_every=1", "stage.validate_every=1")
    assert checkpoints(Path("run"))[-1].name == f"step-{at - 1:06d}"
    state = checkpointed(checkpoints(Path("run"))[-1])
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert [line["step"] for line in metrics("run")] == list(range(1, at))
    assert max(p.name for p in Path("run/lora").iterdir()) == f"HANA_TOFU-{at - 1:06d}.safetensors"
    assert not Path("models").exists()


@pytest.mark.parametrize("every", [pytest.param(0, id="at the end", marks=pytest.mark.slow), 1])
def test_a_lora_too_large_for_its_format_is_not_written_and_its_checkpoint_gives_it_in_another(every):
    steps = f"steps={1 + every}"
    settings = (steps, f"stage.validate_every={every}", "stage.checkpoint_every=0", "lr=1e6")
    with pytest.raises(RunError, match=r"after step 1 is too large for stage\.save_dtype=fp16 .*lower lr.*_dtype=bf16"):
        train("run", *settings, "stage.save_dtype=fp16")
    assert not Path("run/lora").exists() and not Path("models").exists()
    assert [c.name for c in checkpoints(Path("run"))] == ["step-000001"]
    with pytest.raises(RunError, match=r"unet gave values that are not finite; use a LoRA .* lower lr"):
        train("run", *settings[1:], "steps=1", "stage.save_dtype=bf16", f"resume={Path('run').absolute()}")
    assert all(tensor.isfinite().all() for tensor in lora("run").values())
    assert not Path("models").exists(), "what cannot be drawn with is not installed"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stage.ema_decay=0.9", "optimizer=schedule_free"])
def test_weights_that_are_not_finite_are_in_no_checkpoint_and_in_no_file(how, monkeypatch):
    """The loss and the gradient of the step that made them were finite."""
    update = LoRATraining.clip_and_update

    def overflow_in_step_3(self):
        done = update(self)
        if self.step == 3:
            self.params.master.data[5] = math.inf
        return done

    monkeypatch.setattr(LoRATraining, "clip_and_update", overflow_in_step_3)
    with pytest.raises(RunError, match=r"LoRA after step 3 has values that are not finite, .*: use a lower lr"):
        train("run", "steps=3", how, "stage.checkpoint_every=1", "stage.validate_every=1", "stage.save_dtype=fp32")
    assert [c.name for c in checkpoints(Path("run"))] == ["step-000001", "step-000002"]
    assert not Path("run/lora/HANA_TOFU.safetensors").exists() and not Path("models").exists()
    monkeypatch.undo()
