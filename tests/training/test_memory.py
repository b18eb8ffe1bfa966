"""What a run is expected to take, and what it says where that was too much."""

import json

import pytest
import torch

from lora_lab.errors import RunError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.settings.schema import OptimizerTraits
from lora_lab.training import engine
from lora_lab.training.memory import TrainingSize, describe_memory, expected_mib, memory_hint
from lora_lab.training.resolve import training_size

SDXL = ("stage=train", "experiment=sdxl", "dataset.root=x")
PRESETS = ("fast", "balanced", "low", "minimal")


def size_of(*overrides: str) -> TrainingSize:
    config = compose(*SDXL, *overrides)
    return training_size(config, OptimizerTraits.split(config.optimizer)[0])


def expected(*overrides: str) -> float:
    return expected_mib(size_of(*overrides))


def test_every_preset_takes_less_than_the_one_before():
    taken = [expected(f"memory={name}") for name in PRESETS]
    assert taken == sorted(taken, reverse=True) and len(set(taken)) == len(taken)


@pytest.mark.parametrize(
    "more",
    ["batch_size=2", "rank=64", "model.resolution=1536", "optimizer=adamw", "stage.ema_decay=0.99", "text=lora"],
)
def test_what_needs_more_is_expected_to(more):
    assert expected(more) > expected() + 50


def test_the_plan_says_what_to_change_where_it_does_not_fit():
    size = size_of("memory=fast")
    assert "use" not in describe_memory(size, 80_000)
    assert describe_memory(size, 12_000).endswith("validation images are decoded in tiles, which takes 11.0 GiB")
    assert describe_memory(size, 8_000).endswith("if it runs out, use memory=balanced")


def test_what_helps_leads_down_the_presets_to_the_end():
    said = [memory_hint(compose(*SDXL, f"memory={name}").memory, 1) for name in PRESETS]
    assert said == [f"use memory={name}" for name in PRESETS[1:]] + ["use a smaller rank or model.resolution"]
    assert memory_hint(compose(*SDXL).memory, 4).endswith("batch_size=2 with stage.gradient_accumulation=2")


@pytest.mark.slow
def test_a_run_out_of_memory_keeps_what_it_learnt_and_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ("stage=train", "steps=4", "tracker=off", "model.judge=null", "sampler.steps=1", "stage.validate_every=0")
    common += ("stage.prompts=['A {trigger}']",)
    folder, losses, done = tmp_path / "run", engine.per_sample_loss, []

    def small(*given) -> torch.Tensor:
        if len(done) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        done.append(1)
        return losses(*given)

    monkeypatch.setattr(engine, "per_sample_loss", small)
    with pytest.raises(
        RunError, match=r"out of GPU memory: use memory=balanced, or batch_size=2 .* resume with resume=.*run"
    ):
        run_stage(compose(*common), folder)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert [f.name for f in (folder / "checkpoints").iterdir()] == ["step-000002"]
    run_stage(compose(*common, f"resume={folder}", "memory=low"), folder)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
