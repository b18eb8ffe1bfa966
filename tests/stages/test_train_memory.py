"""What a run gives up for memory."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from lora_lab.demo import TOFU
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.training import trainer
from lora_lab.training.resolve import resolve_run

FAST = (
    "stage=train", "tracker=off", "model.judge=null", "steps=1", "rank=2", "batch_size=1", "sampler.steps=1",
    "stage.prompts=['A {trigger}']", "device=cpu",
)  # fmt: skip


def train(folder: str, *overrides: str) -> float:
    """The loss of the first step."""
    run_stage(compose(*FAST, *overrides), Path(folder).absolute())
    return json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[0])["loss"]


@pytest.mark.slow
def test_cudnn_tries_convolutions_out_in_training_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forward, seen = UNet2DConditionModel.forward, []

    def noting(self, *args, **kwargs):
        seen.append((torch.is_grad_enabled(), torch.backends.cudnn.benchmark))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", noting)
    train("run", "memory.cudnn_benchmark=true")
    assert set(seen) == {(True, True), (False, False)}


@pytest.mark.slow
def test_encoded_images_are_not_kept_while_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = resolve_run(compose(*FAST), tmp_path / "run")
    images = [weakref.ref(image.picture) for image in resolved.images.fitted]
    trainer.train(resolved)
    assert len(images) == 24 and not any(image() for image in images)


@pytest.mark.slow
def test_tiles_of_the_vae_are_what_is_learnt_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("00", "01"):
        (pictures / f"{name}.png").write_bytes((TOFU / f"{name}.png").read_bytes())
        (pictures / f"{name}.txt").write_text("A HANA_TOFU smiling")
    data = f"dataset.root={pictures}"
    whole, tiled = train("whole", data), train("tiled", data, "memory.vae_tiling=true")
    assert 0 < abs(tiled - whole) < 0.2 * whole
