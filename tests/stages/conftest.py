"""Trained runs and a folder to train in, which the files of tests share; a process makes each once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_runs import inside, lora, train

from lora_lab.adapters.files import kohya_state, save_lora
from lora_lab.base.load import load_base
from lora_lab.base.sdxl import SDXL
from lora_lab.demo import TOFU
from lora_lab.launch.config import compose


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("tofu")
    rows = [row for row in (TOFU / "metadata.jsonl").read_text().splitlines() if json.loads(row)["file_name"] < "06"]
    (root / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    for i in range(6):
        shutil.copy(TOFU / f"{i:02d}.png", root)
    return root


@pytest.fixture
def elsewhere(tmp_path, pictures):
    """The test works in a folder of its own."""
    with inside(tmp_path, pictures):
        yield


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, pictures):
    """20 steps at once, for every test that needs something to compare with."""
    with inside(tmp_path_factory.mktemp("uninterrupted"), pictures) as folder:
        train("run", "steps=20", "stage.validate_every=10", "stage.checkpoint_every=10")
    return str(folder / "run")


@pytest.fixture(scope="session")
def three_steps_run(tmp_path_factory, pictures):
    """The folder of a run of three steps without any option."""
    with inside(tmp_path_factory.mktemp("three_steps"), pictures) as folder:
        train("run", "steps=3")
    return str(folder / "run")


@pytest.fixture(scope="session")
def three_steps(three_steps_run):
    """What three steps without any option learn."""
    return lora(three_steps_run)


@pytest.fixture(scope="session")
def made_lora(tmp_path_factory):
    """A LoRA that does something: random matrices in a file of the program's own."""
    unet = load_base(compose().model, torch.device("cpu")).network
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    notes = {"modelspec.trigger_phrase": "HANA_TOFU"}
    return save_lora(folder / "made.safetensors", kohya_state({"unet": unet}, SDXL.lora_key), torch.float32, notes)


@pytest.fixture
def own_pictures(pictures, tmp_path):
    """A copy of the six pictures that a test may change."""
    return Path(shutil.copytree(pictures, tmp_path / "own"))
