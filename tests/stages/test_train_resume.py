"""A run that stops and goes on: to the bit what it would have been, or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    FAST,
    NOISE,
    assert_same,
    cut_out,
    interrupt_at,
    lora,
    metrics,
    train,
    validation,
    without_checksums,
)

from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.training.lora_training import checkpoints
from lora_lab.training.resolve import resolve_training

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_ten_steps_and_ten_resumed_equal_twenty_to_the_bit(uninterrupted):
    train("run", "steps=10")
    train("run", "steps=20", f"resume={Path('run').absolute()}")
    assert_same(lora("run"), lora(uninterrupted))
    assert [line["loss"] for line in metrics("run")] == [line["loss"] for line in metrics(uninterrupted)]


DATA = "dataset.flip=true dataset.shuffle_captions=true dataset.keep_tokens=0 dataset.repeats=2"


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("schedule=cosine stage.lora_plus_ratio=16", marks=pytest.mark.slow),
        pytest.param("optimizer=adamw8bit", marks=pytest.mark.slow),
        pytest.param("optimizer=schedule_free", marks=pytest.mark.slow),
        pytest.param("stage.ema_decay=0.9", marks=pytest.mark.slow),
        pytest.param(f"adapter.lora_dropout=0.5 {NOISE}", marks=pytest.mark.slow),
        pytest.param(DATA, marks=pytest.mark.slow),
        pytest.param("adapter=pissa", marks=pytest.mark.slow),
        pytest.param("adapter=lokr adapter.module_dropout=0.5", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_leaves_a_checkpoint_that_goes_on_exactly(how, monkeypatch):
    how = how.split()
    train("whole", "steps=6", "stage.validate_every=2", *how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=r"stopped after step 3.*resume="):
        interrupt_at(3, patch)
        train("cut", "steps=6", *how)
    assert [c.name for c in checkpoints(Path("cut"))] == ["step-000003"]
    assert not Path("cut/result.json").exists()
    train("cut", "steps=6", *how, f"resume={Path('cut').absolute()}")
    assert_same(lora("cut"), lora("whole"))
    assert [line["step"] for line in metrics("cut")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(uninterrupted):
    train("run", "steps=10", "stage.checkpoint_every=5")
    half = Path("run/checkpoints/.step-000015")  # what a kill in the middle of writing leaves
    half.mkdir()
    (half / "learnt.safetensors").write_bytes(b"half")
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')
    train("run", "steps=20", f"resume={Path('run').absolute()}")
    assert_same(lora("run"), lora(uninterrupted))
    assert [line["step"] for line in metrics("run")] == list(range(1, 21))


@pytest.mark.slow
def test_a_checkpoint_that_this_version_cannot_read_is_refused():
    train("run", "steps=2")
    state = Path("run/checkpoints/step-000002/state.pt")
    without_checksums(state.parent)
    kept = torch.load(state, weights_only=True)
    torch.save(kept | {"names": [name.replace("to_q", "query") for name in kept["names"]]}, state)
    with pytest.raises(InputError, match="step-000002 have other names, from another version of diffusers or peft"):
        train("run", "steps=4", f"resume={Path('run').absolute()}")
    state.with_name("learnt.safetensors").rename(state.with_name("adapter.safetensors"))
    with pytest.raises(InputError, match="step-000002 is from an older version of lora_lab"):
        train("run", "steps=4", f"resume={Path('run').absolute()}")


def test_a_folder_without_a_run_is_not_resumed():
    Path("empty").mkdir()
    for folder in (Path("missing"), Path("empty")):
        for stage in ("train", "evaluate", "img2img", "pipeline"):
            photo = ["stage.photo=me.jpg"] if stage == "img2img" else []
            with pytest.raises(InputError, match=f"^resume={folder}: {folder} has no run"):
                run_stage(compose(f"stage={stage}", f"resume={folder}", *photo), folder.absolute())
        with pytest.raises(InputError, match=f"^resume={folder}: {folder} has no run"):
            resolve_training(compose(*FAST, f"resume={folder}"), folder.absolute())
        assert not folder.exists() or not [*folder.iterdir()]


def test_a_resumed_run_refuses_to_become_another_one():
    train("run", "steps=2")
    for change, named in (
        ("rank=8", r"rank=4, not 8 \(also .*adapter\.r"),
        ("lr=5e-4", r"lr=0\.001, not 0\.0005 \(also optimizer\.lr\)"),
        ("model.vae=other", r"model\.vae=None, not other"),
        ("model.bucket_step=8", r"model\.bucket_step=16, not 8"),
        ("model.variant=fp16", r"model\.variant=None, not fp16"),
        ("model.config=other", r"model\.config=None, not other"),
        ("seed=1", "seed"),
        ("batch_size=1", "batch_size"),
        ("loss=plain", "loss.weighting"),
        ("stage.ema_decay=0.5", "stage.ema_decay"),
        ("schedule.warmup=1", "schedule"),
        ("dataset.repeats=2", r"dataset\.repeats=\[1\], not \[2\]"),
        ("dataset.random_crop=true", r"dataset\.random_crop"),
        ("dataset.shuffle_captions=true", r"dataset\.shuffle_captions"),
        ("dataset.caption_suffix=x", r"dataset\.caption_suffix"),
    ):
        with pytest.raises(InputError, match=named):
            train("run", "steps=4", change, f"resume={Path('run').absolute()}")
    with pytest.raises(InputError, match="beyond steps=1"):
        train("run", "steps=1", f"resume={Path('run').absolute()}")


@pytest.mark.slow
def test_a_checkpoint_without_a_key_is_resumed_and_the_key_named(capsys):
    train("run", "steps=2")
    record = Path("run/checkpoints/step-000002/training.json")
    saved = without_checksums(record.parent)
    del saved["recipe"]["model.vae"], saved["recipe"]["model.variant"]
    record.write_text(json.dumps(saved))
    train("run", "steps=3", f"resume={Path('run').absolute()}")
    out = capsys.readouterr().out
    assert "older version of lora_lab and could not be compared in model.vae, model.variant\n" in out
    assert "older version of lora_lab and has no checksums: it is not verified\n" in out
    assert [line["step"] for line in metrics("run")] == [1, 2, 3]


@pytest.mark.slow
def test_resuming_a_finished_run_publishes_nothing_twice():
    train("run", "steps=2")
    train("run", "steps=2", f"resume={Path('run').absolute()}")
    assert [p.name for p in Path("models/lora").iterdir()] == ["HANA_TOFU.safetensors"]


@pytest.mark.slow
def test_a_masked_run_goes_on_with_the_same_masks_wherever_they_are(tmp_path):
    left, other = cut_out(tmp_path / "left", (0, 0, 64, 128)), cut_out(tmp_path / "other", (0, 0, 99, 128))
    train("whole", "steps=4", f"loss.mask={left}", "dataset.flip=true")
    train("cut", "steps=2", f"loss.mask={left}", "dataset.flip=true")
    go_on = ("steps=4", f"resume={Path('cut').absolute()}", "dataset.flip=true")
    for mask, named in ((other, "masks"), ("none", r"loss\.mask"), ("alpha", r"loss\.mask")):
        with pytest.raises(InputError, match=f"trained with {named}="):
            train("cut", *go_on, f"loss.mask={mask}")
    train("cut", *go_on, f"loss.mask={left.rename(tmp_path / 'moved')}")
    assert_same(lora("cut"), lora("whole"))


def test_only_the_newest_checkpoints_are_kept():
    train("run", "steps=6", "stage.checkpoint_every=1", "stage.keep_checkpoints=3")
    assert [c.name for c in checkpoints(Path("run"))] == ["step-000004", "step-000005", "step-000006"]


@pytest.mark.slow
def test_a_run_killed_while_it_rendered_renders_and_measures_on_resume_what_was_due():
    """The checkpoint of a step is written before its validation images and loss."""
    settings = ("steps=4", "stage.checkpoint_every=2", "stage.validate_every=2", "stage.validation_loss_every=2")
    train("run", *settings, "stage.seeds=[0,1]")
    run = Path("run").absolute()
    images, losses = sorted((run / "samples" / "step-000002").iterdir()), validation("run")
    expected = [image.read_bytes() for image in images]
    for lost in (run / "checkpoints" / "step-000004", run / "samples" / "step-000004"):
        shutil.rmtree(lost)
    images[1].unlink()
    (run / "lora" / "HANA_TOFU-000002.safetensors").unlink()
    (run / "validation.jsonl").write_text(f'{{"step": 0, "loss": {losses[0]}}}\n')
    train("run", *settings, "stage.seeds=[0,1]", f"resume={run}")
    assert [image.read_bytes() for image in images] == expected
    assert (run / "lora" / "HANA_TOFU-000002.safetensors").is_file() and (run / "samples" / "step-000004").is_dir()
    assert validation("run") == losses
