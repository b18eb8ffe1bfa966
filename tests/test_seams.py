"""A captioner, a refiner and an optimizer are each added by one Python file and one YAML file outside the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_lab.captions.files import read_captions, write_captions
from lora_lab.demo import TOFU

NAMES = ("00.png", "03.png", "06.png")

CAPTIONER = '''
from PIL import Image


class ColourCaptioner:
    """Names the mean colour of an image."""

    def __init__(self, device, noun: str, precision: int = 0):
        self.noun, self.precision = noun, precision

    def caption(self, images: list[Image.Image]) -> list[str]:
        pixels = [image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for image in images]
        return [f"a {self.noun} of #{r:02x}{g:02x}{b:02x}" for r, g, b in pixels]
'''
FORGETFUL = """
import json


class Forgetful:
    def __init__(self, device):
        pass

    def caption(self, images):
        return ["a picture"] * (len(images) - 1)
"""
REFINER = '''
class PrefixRefiner:
    """Puts the trigger in front and the hint at the end."""

    def __init__(self, separator: str):
        self.separator = separator

    def refine(self, captions, hints, trigger):
        texts = [text.removeprefix(trigger + self.separator) for text in captions]
        return [self.separator.join(filter(None, [trigger, text, hint])) for text, hint in zip(texts, hints)]
'''
OPTIMIZER = '''
import torch


class SignSGD(torch.optim.Optimizer):
    """Moves every number by lr against the sign of its gradient."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()
'''


@pytest.fixture
def work(tmp_path):
    """A working folder with three of the tofu images, and a folder for a user's own code and options."""
    (tmp_path / "tofu").mkdir()
    for name in NAMES:
        shutil.copy(TOFU / name, tmp_path / "tofu")
    return tmp_path


def add_option(work: Path, group: str, name: str, code: str, option: str) -> None:
    """The Python file and the YAML file of a user's own `group`=`name`."""
    folder = work / "plugin" / "conf" / group
    folder.mkdir(parents=True)
    (work / "plugin" / f"{name}.py").write_text(code)
    (folder / f"{name}.yaml").write_text(option)


def lora_lab(work: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The program as a user starts it in the folder `work`."""
    plugin = work / "plugin"
    names = ["color", *sorted(file.stem for file in plugin.glob("*.py"))]
    search = f"hydra.searchpath=['file://{plugin / 'conf'}']"
    paths = os.pathsep.join([str(plugin), str(Path(__file__).parents[1])])
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "lora_lab",
            "dataset=folder",
            "dataset.root=tofu",
            "device=cpu",
            search,
            f"allow_targets=[{','.join(names)}]",
            *arguments,
        ],
        cwd=work,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_captioner_of_the_users_own_writes_captions(work):
    option = "_target_: colour.ColourCaptioner\nname: colours\nnoun: tofu\n"
    add_option(work, "captioner", "colour", CAPTIONER, option)
    done = lora_lab(work, "stage=caption", "captioner=colour", "captioner.noun=ghost")
    assert done.returncode == 0, done.stderr
    captions = read_captions(work / "tofu")
    assert list(captions) == list(NAMES) and len(set(captions.values())) == 3
    assert all(text.startswith("a ghost of #") for text in captions.values())
    history = [json.loads(line) for line in (work / "tofu" / "captions.history.jsonl").read_text().splitlines()]
    assert {row["by"] for row in history} == {"colours"}


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("captioner.nuon=x", "captioner.nuon: no such key, did you mean captioner.noun?"),
        ("captioner.precision=much", "captioner.precision=much: should be a valid integer"),
        (
            "captioner._target_=forgetful.json.loads",
            "captioner._target_=forgetful.json.loads: cannot be imported (json is a module that forgetful uses",
        ),
        (
            "captioner._target_=color.Captioner",
            "captioner._target_=color.Captioner: needs the package color, which is not installed",
        ),
        (
            "captioner._target_=colours.Captioner",
            "captioner._target_=colours.Captioner: no option in conf/captioner has it, and no module of allow_targets",
        ),
        ("captioner._target_=colour.Captioner", "captioner._target_=colour.Captioner: cannot be imported"),
        ("captioner._target_=forgetful.Forgetful", "captioner.noun: forgetful.Forgetful does not accept noun"),
    ],
)
def test_a_wrong_setting_of_an_added_captioner_is_refused_in_one_sentence(work, argument, sentence):
    add_option(work, "captioner", "colour", CAPTIONER, "_target_: colour.ColourCaptioner\nnoun: tofu\nprecision: 0\n")
    (work / "plugin" / "forgetful.py").write_text(FORGETFUL)
    refused = lora_lab(work, "stage=caption", "captioner=colour", argument)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"lora_lab: {sentence}") and refused.stderr.count("\n") == 1
    assert not (work / "tofu" / "metadata.jsonl").exists()


@pytest.mark.slow
def test_a_captioner_that_loses_an_image_is_an_error(work):
    add_option(work, "captioner", "forgetful", FORGETFUL, "_target_: forgetful.Forgetful\n")
    failed = lora_lab(work, "stage=caption", "captioner=forgetful")
    assert failed.returncode == 1
    assert "the captioner Forgetful returned 0 captions for 1 images" in failed.stderr
    assert not (work / "tofu" / "metadata.jsonl").exists()


def test_a_refiner_of_the_users_own_rewrites_captions_with_their_hints(work):
    write_captions(work / "tofu", {"00.png": "smiling", "03.png": "HANA_TOFU - winking", "06.png": "with a hat"})
    (work / "tofu" / "hints.csv").write_text("file_name,text\n06.png,in the snow\n")
    add_option(work, "refiner", "prefix", REFINER, "_target_: prefix.PrefixRefiner\nseparator: ', '\n")
    done = lora_lab(work, "stage=refine", "refiner=prefix", "refiner.separator=' - '")
    assert done.returncode == 0, done.stderr
    assert read_captions(work / "tofu") == {
        "00.png": "HANA_TOFU - smiling",
        "03.png": "HANA_TOFU - winking",
        "06.png": "HANA_TOFU - with a hat - in the snow",
    }


@pytest.mark.slow
def test_an_optimizer_of_the_users_own_trains_the_lora(work):
    write_captions(work / "tofu", dict.fromkeys(NAMES, "A HANA_TOFU, smiling"))
    option = "_target_: sign.SignSGD\n_partial_: true\nelementwise: true\nlr: ${lr}\n"
    add_option(work, "optimizer", "sign", OPTIMIZER, option)
    done = lora_lab(
        work, "stage=train", "optimizer=sign", "lr=1e-3", "steps=2", "rank=2", "batch_size=1", "tracker=off",
        "model.judge=null", "sampler.steps=2", "stage.prompts=['A {trigger}']", "stage.save_dtype=fp32",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors = load_file(json.loads((work / "run" / "result.json").read_text())["lora"])
    moved = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith("lora_up.weight")]).abs()
    reachable = torch.tensor([0.0, 1e-3, 2e-3])  # zero at first, then two steps of lr, 0 or -lr
    assert (moved[:, None] - reachable).abs().min(dim=1).values.max() < 1e-8
    assert (moved > 1.9e-3).float().mean() > 0.25
