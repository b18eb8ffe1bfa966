"""The extensions of CONTRIBUTING.md fit the source, and work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from lora_lab.captions.files import read_captions
from lora_lab.demo import TOFU

HOME = Path(__file__).resolve().parents[1]
TEXT = (HOME / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n## Extensions\n")[2]
NEW_FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)^```", TEXT, re.M | re.S))
DIFFS = re.findall(r"^```diff\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S) for line in block.splitlines()]


def hunks() -> list[tuple[str, str, str]]:
    """(file, lines before, lines after) of every hunk in the page."""
    found = []
    for part in re.split(r"^--- a/", "".join(DIFFS), flags=re.M)[1:]:
        header, *changes = re.split(r"^@@\n", part, flags=re.M)
        for change in changes:
            lines = change.splitlines(keepends=True)
            before, after = ("".join(line[1:] for line in lines if line[0] in marks) for marks in (" -", " +"))
            found.append((header.splitlines()[0], before, after))
    return found


def test_every_change_of_the_page_fits_the_source():
    assert len(hunks()) >= 6 and {file for file, _, _ in hunks()} >= {"lora_lab/track/__init__.py"}
    for file, before, after in hunks():
        assert (HOME / file).read_text(encoding="utf-8").count(before) == 1 and before != after, f"{file}:\n{before}"


def test_no_file_of_the_page_exists_already():
    assert len(NEW_FILES) >= 11
    for file in NEW_FILES:
        assert (HOME / file).parent.is_dir() and not (HOME / file).exists(), file


@pytest.mark.slow
def test_every_extension_of_the_page_works(tmp_path):
    for folder in ("conf", "lora_lab", "tests", "hydra_plugins"):
        shutil.copytree(HOME / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for folder, pattern in (("experiments", "*.yaml"), (".", "pyproject.toml")):
        (tmp_path / folder).mkdir(exist_ok=True)
        for file in (HOME / folder).glob(pattern):
            shutil.copy(file, tmp_path / folder)
    images = tmp_path / "data" / "TOFU"
    images.mkdir(parents=True)
    for name in ("00.png", "03.png", "06.png"):
        shutil.copy(TOFU / name, images)
    for file, text in NEW_FILES.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    for file, before, after in hunks():
        text = (tmp_path / file).read_text(encoding="utf-8")
        (tmp_path / file).write_text(text.replace(before, after), encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(tmp_path)}
    for number, command in enumerate(COMMANDS):
        if "-m lora_lab stage=" in command:  # else two short runs may share the folder of one second
            command += f" hydra.run.dir=outputs/{number:02}"
        command = command.replace("PYTHONPATH=tests", f"PYTHONPATH={tmp_path}:{tmp_path / 'tests'}")
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    captions = list(read_captions(images).values())
    assert len(captions) == 3 and all(re.fullmatch(r"HANA_TOFU, a tofu of #\w{6}", text) for text in captions)
    stages = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(tmp_path.glob("outputs/*/result.json"))]
    (sheet,) = [result for result in stages if result["stage"] == "sheet"]
    assert sheet["images"] == 3 and Path(tmp_path, sheet["sheet"]).is_file()
    trained = [Path(tmp_path, result["lora"]) for result in stages if result["stage"] == "train"]
    assert len(trained) == 4, "optimizer, adapter, tracker, base model"
    metadata = []
    for file in trained:
        with safe_open(file, "pt") as opened:
            metadata.append(opened.metadata())
    assert metadata[-1]["modelspec.architecture"] == "toy/lora"
    (tracked,) = tmp_path.glob("outputs/*/track.jsonl")
    lines = [json.loads(line) for line in tracked.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert any("validation/p0-s0" in line for line in lines)
