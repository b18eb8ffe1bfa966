"""What a run leaves behind: its folder, the published LoRA, pictures that inference gives, the tracker."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import MEASURED, lora, metrics, train, validation

from lora_lab.demo import BASE
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.training.lora_training import checkpoints

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.slow
def test_a_validation_picture_is_what_inference_gives_in_a_new_process(uninterrupted):
    picture = Path(uninterrupted, "samples", "step-000020", "p0-s0.png")
    code = f"""
import torch; torch.set_num_threads({torch.get_num_threads()})
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
pipe = StableDiffusionXLPipeline.from_pretrained({str(BASE)!r}, dtype=torch.float32)
pipe.load_lora_weights({uninterrupted + "/lora"!r}, weight_name="HANA_TOFU.safetensors")
pipe("A HANA_TOFU with a green background", width=128, height=128, num_inference_steps=2, guidance_scale=5.0,
     generator=torch.Generator("cpu").manual_seed(0)).images[0].save("again.png")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(picture)))
    assert Image.open(picture).text["prompt"] == "A HANA_TOFU with a green background"


@pytest.mark.slow
def test_a_base_said_to_predict_v_is_drawn_with_as_it_was_trained():
    """In validation, in plain diffusers, and in img2img of the file, which remembers what the command line said."""
    train("run", "steps=2", "loss=zero_snr")
    shown = np.asarray(Image.open("run/samples/step-000002/p0-s0.png"))
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights("run/lora/HANA_TOFU.safetensors")
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    drawn = pipe(
        "A HANA_TOFU with a green background", width=128, height=128, num_inference_steps=2, guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(drawn), shown)
    asked = ("stage=img2img", "lora=run", "stage.photo=demo:photos/1.png", "stage.prompt='A {trigger}'", "device=cpu",
             "sampler.steps=2")  # fmt: skip

    def photo_drawn(folder, *overrides):
        return np.asarray(Image.open(run_stage(compose(*asked, *overrides), Path(folder)).pictures[0].picture))

    remembered = photo_drawn("a")
    assert np.array_equal(remembered, photo_drawn("b", "loss=zero_snr"))
    otherwise = photo_drawn("c", "loss.prediction=epsilon", "loss.zero_terminal_snr=false")
    assert not np.array_equal(remembered, otherwise)


def test_a_run_leaves_what_is_promised(uninterrupted):
    folder = Path(uninterrupted)
    result = json.loads((folder / "result.json").read_text())
    assert result["stage"] == "train" and result["steps"] == 20
    assert Path(result["lora"]).is_file() and result["seconds"] > 0 and math.isfinite(result["loss"])
    assert set(result["samples"]) == {"10", "20"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["sha256"]) == {"base", "dataset", "captions"} and manifest["packages"]["torch"]
    assert [c.name for c in checkpoints(folder)] == ["step-000010", "step-000020"]
    assert Image.open(folder / "loss.png").size[0] > 100
    assert (folder.parent / "models/lora/HANA_TOFU.safetensors").read_bytes() == Path(result["lora"]).read_bytes()
    with safe_open(result["lora"], "pt") as file:
        notes = file.metadata()
    assert notes["modelspec.trigger_phrase"] == "HANA_TOFU" and notes["ss_network_dim"] == "4"
    assert notes["ss_num_train_images"] == "6" and notes["ss_steps"] == "20"


def test_nothing_is_written_outside_the_run_folder_but_the_published_lora_and_the_cache(uninterrupted):
    root = Path(uninterrupted).parent
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "run" not in p.parts[-4:]} >= {
        "models/lora/HANA_TOFU.safetensors"
    }
    assert sorted(p.name for p in root.iterdir()) == ["models", "run"]


def test_an_older_lora_of_the_same_name_is_kept():
    Path("models/lora").mkdir(parents=True)
    Path("models/lora/HANA_TOFU.safetensors").write_bytes(b"precious")
    train("run", "steps=1")
    assert Path("models/lora/HANA_TOFU.1.safetensors").read_bytes() == b"precious"
    assert load_file("models/lora/HANA_TOFU.safetensors").keys() == lora("run").keys()


def test_a_second_run_into_the_same_folder_is_refused():
    train("run", "steps=1")
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="has a run already"):
        train("run", "steps=2")
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_scores_stand_in_the_result_with_every_picture_they_are_read_from(capsys):
    few = "score.prompts=['A {trigger} with a red background']", "score.other_prompts=['A {class_noun}']"
    result = train("run", "steps=2", "lr=0.05", "model.judge=demo:tiny-clip", *few)
    kept = json.loads(Path("run/result.json").read_text())
    assert kept["scores"]["score"]["value"] == result.scores["score"].value
    assert kept["scores"]["leakage"]["value"] > 0 and abs(kept["scores_before"]["leakage"]["value"]) < 1e-3
    assert kept["scores"]["subject"] != kept["scores_before"]["subject"]
    lines = [json.loads(line) for line in Path("run/scores.jsonl").read_text().splitlines()]
    assert all(Path(line["picture"]).is_file() for line in lines)
    by_base, by_lora = ([line for line in lines if bool(line["lora"]) is with_lora] for with_lora in (False, True))
    three_prompts_then_eight_photos = [False] * 3 + [True] * 8
    assert [bool(line.get("photo")) for line in by_base] == three_prompts_then_eight_photos
    assert [bool(line.get("photo")) for line in by_lora] == three_prompts_then_eight_photos
    assert {Path(line["picture"]).name for line in by_lora} == {p.name for p in Path("run/samples/score").iterdir()}
    said = capsys.readouterr().out
    assert "subject" in said and f"{result.scores['score'].value:.2f}" in said


@pytest.mark.slow
def test_what_the_base_draws_of_the_validation_prompts_lies_beside_what_the_lora_draws():
    train("run", "steps=1", "lr=0.05")
    before, after = (Image.open(f"run/samples/{name}/p0-s0.png") for name in ("base", "step-000001"))
    assert before.text["prompt"] == after.text["prompt"] and before.text["lora"] == "none"
    assert before.size == after.size and not np.array_equal(np.asarray(before), np.asarray(after))
    train("other", "steps=1", "lr=0.01")
    assert np.array_equal(np.asarray(before), np.asarray(Image.open("other/samples/base/p0-s0.png")))


@pytest.mark.slow
def test_without_a_judge_there_are_no_scores():
    result = train("run", "steps=1")
    assert result.scores is None and result.scores_before is None and not Path("run/scores.jsonl").exists()


@pytest.mark.slow
def test_an_offline_wandb_run_holds_the_losses_the_pictures_and_the_settings(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))  # no .netrc of whoever runs the tests
    train("run", "steps=3", "tracker=wandb", "tracker.mode=offline", "tracker.group=nightly", *MEASURED)
    (record,) = Path("run/wandb").glob("offline-run-*")
    asked = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    records = [json.loads(line) for line in subprocess.run(asked, check=True, capture_output=True).stdout.splitlines()]
    rows = [r["history"]["item"] for r in records if r["type"] == "history"]
    losses = {row["global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in metrics("run")})
    measured = {row["global_step"]: row["validation/loss"] for row in rows if "validation/loss" in row}
    assert measured == pytest.approx(validation("run"))
    (drawn,) = [row for row in rows if "validation/p0-s0.path" in row]
    logged = Image.open(record / "files" / drawn["validation/p0-s0.path"]).convert("RGB")
    assert np.array_equal(np.asarray(logged), np.asarray(Image.open("run/samples/step-000003/p0-s0.png")))
    assert "A HANA_TOFU with a green background" in drawn["validation/p0-s0.caption"]
    assert "nightly" in json.dumps(records) and '"rank"' in json.dumps(records)
