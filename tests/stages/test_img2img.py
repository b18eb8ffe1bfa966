"""Photos become pictures of the asked size, prompts are told, seeds and strength act."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_lab.demo import PHOTOS
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.stages import run

FAST = ("stage=img2img", "device=cpu", "sampler.steps=4", "stage.strength=0.8")


def draw(folder: Path, *overrides: str):
    return run(compose(*FAST, *overrides), folder)


def test_a_photo_is_captioned_refined_and_drawn(tmp_path, made_lora):
    result = draw(tmp_path / "run", f"lora={made_lora}", f"stage.photo={PHOTOS / '1.png'}")
    (drawn,) = result.pictures
    assert "green background" in drawn.caption and "HANA_TOFU" not in drawn.caption
    assert drawn.prompt.startswith("A HANA_TOFU with a green background") and "skin" not in drawn.prompt
    picture = Image.open(drawn.picture)
    assert picture.size == (128, 128) and picture.text["prompt"] == drawn.prompt
    (row,) = map(json.loads, (tmp_path / "run/prompts.jsonl").read_text().splitlines())
    assert row["prompt"] == drawn.prompt and row["seed"] == 0
    sheet = Image.open(result.sheet)
    assert sheet.width > 3 * 256 and json.loads((tmp_path / "run/result.json").read_text())["sheet"] == result.sheet


def test_the_lora_and_its_weight_matter(tmp_path, made_lora):
    photo = f"stage.photo={PHOTOS / '1.png'}"

    def pixels(name, *overrides):
        result = draw(tmp_path / name, photo, "stage.prompt='A {trigger}'", *overrides)
        assert result.pictures[0].prompt == "A HANA_TOFU" and result.pictures[0].caption is None
        return np.asarray(Image.open(result.pictures[0].picture)).astype(int)

    full, half = pixels("full", f"lora={made_lora}"), pixels("half", f"lora={made_lora}", "stage.lora_weight=0.5")
    none = pixels("none", "stage.lora_weight=0")
    assert np.abs(full - none).mean() > np.abs(half - none).mean() > 1


def test_what_the_sampler_and_memory_are_asked_reaches_the_pictures(tmp_path, made_lora):
    asked = f"stage.photo={PHOTOS / '1.png'}", "stage.prompt='A {trigger}'", f"lora={made_lora}", "model.precision=bf16"

    def pixels(name, *overrides):
        pictures = draw(tmp_path / name, *asked, "stage.seeds=[0,1]", *overrides).pictures
        return np.stack([np.asarray(Image.open(drawn.picture)).astype(int) for drawn in pictures])

    plain = pixels("plain")
    for option in ("sampler.fuse=true", "memory.vae_tiling=true"):
        assert 0 < np.abs(pixels(option, option) - plain).mean() < 4, option


def test_with_offload_the_parts_take_turns_and_the_pictures_are_the_same(tmp_path, made_lora, monkeypatch):
    import torch

    moved, to, device = [], torch.nn.Module.to, torch.device("cpu:0")  # the CPU, told apart by name

    def watched(self, *arguments, **settings):
        if type(self).__name__ in turns and arguments and arguments[0] in (device, "cpu"):
            moved.append((type(self).__name__, "in" if arguments[0] == device else "out"))
        return to(self, *arguments, **settings)

    turns = ["CLIPTextModel", "CLIPTextModelWithProjection", "AutoencoderKL", "UNet2DConditionModel", "AutoencoderKL"]
    asked = f"stage.photo={PHOTOS / '1.png'}", "stage.prompt='A {trigger}'", f"lora={made_lora}"
    (plain,) = draw(tmp_path / "plain", *asked).pictures
    monkeypatch.setattr(torch.nn.Module, "to", watched)
    (drawn,) = draw(tmp_path / "offload", *asked, "memory.offload=true", "device='cpu:0'").pictures
    stored = [("UNet2DConditionModel", way) for way in ("in", "out")]  # while its weights are made smaller
    assert moved == [*stored, *((part, way) for part in turns for way in ("in", "out"))]
    assert np.array_equal(*(np.asarray(Image.open(each.picture)) for each in (plain, drawn)))


def test_a_list_and_a_folder_of_photos_with_two_seeds(tmp_path, made_lora):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.open(PHOTOS / "2.png").resize((300, 200)).save(folder / "wide.png")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "wide.png", other / "wide.png")  # two photos of one name
    result = draw(
        tmp_path / "run", f"lora={made_lora}", f"stage.photo=['{folder}','{other / 'wide.png'}']", "stage.seeds=[1,2]",
        "stage.prompt='a {trigger}'",
    )  # fmt: skip
    assert len(result.pictures) == 4 and len({drawn.picture for drawn in result.pictures}) == 4
    assert {Image.open(drawn.picture).size for drawn in result.pictures} == {(160, 96)}
    one, two = (np.asarray(Image.open(drawn.picture)) for drawn in result.pictures[:2])
    assert not np.array_equal(one, two)


def test_low_strength_keeps_more_of_the_photo(tmp_path):
    photo = np.asarray(Image.open(PHOTOS / "5.png").resize((128, 128))).astype(int)

    def distance(strength):
        overrides = (
            f"stage.photo={PHOTOS / '5.png'}",
            "stage.lora_weight=0",
            "stage.prompt='a cat'",
            f"stage.strength={strength}",
        )
        result = draw(tmp_path / str(strength), *overrides, "sampler.steps=8")
        return np.abs(np.asarray(Image.open(result.pictures[0].picture)).astype(int) - photo).mean()

    assert distance(0.2) < distance(1.0)


def test_what_cannot_be_drawn_is_refused_before_the_base_loads(tmp_path, made_lora, monkeypatch):
    monkeypatch.setattr("lora_lab.stages.img2img.load_base_for_sampling", lambda *_: pytest.fail("the base was loaded"))
    photo = f"stage.photo={PHOTOS / '1.png'}"
    for overrides, words in (
        ((photo, f"lora={made_lora}", "stage.strength=0.1"), "leaves no step to run"),
        ((photo,), "lora is missing"),
        ((photo, f"lora={made_lora}", "trigger=OTHER"), "say trigger=HANA_TOFU"),
        ((f"lora={made_lora}", f"stage.photo={tmp_path / 'nobody.jpg'}"), r"nobody\.jpg"),
        ((photo, "lora=HANNA"), "HANNA"),
        ((photo, f"lora={made_lora}", "loss.zero_terminal_snr=true"), "predicts epsilon"),
    ):
        with pytest.raises(InputError, match=words):
            draw(tmp_path / "run", *overrides)
