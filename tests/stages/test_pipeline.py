"""The command without arguments, shortened: every stage runs and fits the next."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from lora_lab.captions.files import read_captions
from lora_lab.demo import PHOTOS, TOFU
from lora_lab.errors import InputError
from lora_lab.images.pixels import open_picture
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.stages import img2img as img2img_module
from lora_lab.stages import pipeline as pipeline_module
from lora_lab.stages.pipeline import draw_overview

SHORT = (
    "steps=2", "rank=2", "batch_size=1", "sampler.steps=2", "device=cpu", "tracker=off",
    "stage.train.prompts=['A {trigger}']", "stage.img2img.strength=0.6",
    "score.prompts=['A {trigger}']", "score.other_prompts=['A {class_noun}']", "score.seeds=[0]",
)  # fmt: skip


@pytest.mark.slow
def test_the_pipeline_goes_from_pictures_to_an_overview(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_stage(compose(*SHORT), tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["stage"] == "pipeline" and result["steps"] == 2
    assert Path(result["lora"]).is_file() and result["scores"]["score"]["low"] <= result["scores"]["score"]["high"]
    captions = read_captions(Path(result["dataset"]))
    assert len(captions) == 24 and all(text.count("HANA_TOFU") == 1 for text in captions.values())
    overview = Image.open(result["overview"])
    assert overview.width > 4 * 256 and overview.height > 8 * 256
    assert len(list((tmp_path / "run/img2img/after").glob("*-s0.png"))) == 8
    last = capsys.readouterr().out.strip().splitlines()[-3:]
    assert "HANA_TOFU was learnt in 2 steps" in last[0]
    assert "overview.png" in last[1] and "python -m lora_lab stage=img2img lora=HANA_TOFU" in last[2]


@pytest.mark.slow
def test_a_pipeline_killed_before_its_first_checkpoint_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = (*SHORT, "model.judge=null", f"stage.img2img.photo={PHOTOS / '1.png'}")
    folder, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    endless = ("steps=10000", "stage.train.checkpoint_every=0", f"hydra.run.dir={folder}")
    with subprocess.Popen([sys.executable, "-m", "lora_lab", *short, *endless], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (metrics.is_file() and "\n" in metrics.read_text()):
            time.sleep(0.05)
        process.kill()
    first = json.loads(metrics.read_text().splitlines()[0])
    assert not list(folder.glob("checkpoints/*"))
    run_stage(compose(*short, f"resume={folder}"), folder)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == first["loss"]
    assert (folder / "overview.png").is_file()


class Killed(BaseException):
    """Caught by nothing in the program."""


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Overrides for three training images and two photos, and what an uninterrupted pipeline makes of them."""
    root = tmp_path_factory.mktemp("few")
    for name, source, files in (("tofu", TOFU, ("00", "01", "02")), ("photos", PHOTOS, "12")):
        (root / name).mkdir()
        for file in files:
            shutil.copy(source / f"{file}.png", root / name)
    short = (*SHORT, "dataset=folder", f"dataset.root={root / 'tofu'}", f"stage.img2img.photo={root / 'photos'}",
             "score.attributes=[]", f"cache={root / 'cache'}", "publish=false")  # fmt: skip
    run_stage(compose(*short), root / "whole")
    return short, root / "whole"


def left_in(folder):
    """All that does not tell the time, with paths as in any folder."""
    files = [file for file in folder.rglob("*") if file.suffix in (".png", ".jsonl", ".safetensors", ".json")]
    kept = [f for f in files if f.name not in ("manifest.json", "metrics.jsonl", "loss.png", "captions.history.jsonl")]
    contents = {f.relative_to(folder): f.read_bytes().replace(bytes(folder), b"FOLDER") for f in kept}
    result = json.loads(contents.pop(Path("result.json")))
    learnt = {path: content for path, content in contents.items() if "checkpoints" not in path.parts}
    for path in learnt:  # the metadata of a LoRA file have no fixed order, and those of an image its hash
        if path.suffix == ".safetensors":
            learnt[path] = {key: value.tolist() for key, value in load_file(folder / path).items()}
        elif path.suffix == ".png":
            learnt[path] = Image.open(folder / path).tobytes()
    return learnt, {key: value for key, value in result.items() if key != "seconds"}


@pytest.mark.slow
@pytest.mark.parametrize("at", ["caption", "refine", "train", "img2img", "the first picture", "the third picture"])
def test_a_pipeline_killed_anywhere_equals_an_uninterrupted_one(few, tmp_path, monkeypatch, at):
    short, whole = few
    chosen, save, saved = pipeline_module.stage_function, img2img_module.save_picture, []

    def killed_stage(settings):
        if settings.__name__.lower() == at:
            raise Killed
        return chosen(settings)

    def killed_picture(*arguments):
        saved.append(None)
        if at == {1: "the first picture", 3: "the third picture"}.get(len(saved)):
            raise Killed
        return save(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(pipeline_module, "stage_function", killed_stage)
        patched.setattr(img2img_module, "save_picture", killed_picture)
        run_stage(compose(*short), tmp_path / "run")
    run_stage(compose(*short, f"resume={tmp_path / 'run'}"), tmp_path / "run")
    (files, result), (expected, expected_result) = left_in(tmp_path / "run"), left_in(whole)
    assert result == expected_result and files.keys() == expected.keys()
    assert [path for path in files if files[path] != expected[path]] == []


def test_wrong_settings_of_a_later_stage_are_refused_before_the_dataset_is_copied(tmp_path):
    for override in ("captioner.beams=0", "refiner.subjects=cat"):
        with pytest.raises(InputError, match=override.partition("=")[0]):
            run_stage(compose(*SHORT, override), tmp_path / "run")
        assert not (tmp_path / "run" / "dataset").exists()


def test_the_overview_shows_a_photo_upright(tmp_path):
    """Turned as the camera says: the raw pixels of a phone's photo lie on their side."""
    photo = Image.effect_noise((60, 40), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "phone.png", exif=exif)
    turned = open_picture(tmp_path / "phone.png")
    assert turned.size == (40, 60)
    turned.save(tmp_path / "turned.png")
    sheets = []
    for name in ("phone", "turned"):
        drawn = SimpleNamespace(photo=tmp_path / f"{name}.png", picture=PHOTOS / "1.png", caption=None, prompt="a tofu")
        sheets.append(np.asarray(Image.open(draw_overview([drawn], [drawn], tmp_path / f"{name}-overview.png"))))
    assert np.array_equal(*sheets)
