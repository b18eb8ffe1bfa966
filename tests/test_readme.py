"""The READMEs' commands do what the READMEs say: run from top to bottom, with the tiny base in SDXL's place."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_lab import demo
from lora_lab.__main__ import cli
from lora_lab.launch import command_line, config

HOME = Path(__file__).resolve().parents[1]
README = HOME / "README.md"
OTHERS = (HOME / "README.ko.md", *sorted((HOME / "docs").glob("*.md")))
COMMAND = "python -m lora_lab"

# What stands in for the downloads and the hours; everything else of a command stays as a reader would type it.
TINY_BASE = {
    "model.base": "demo:tiny-sdxl",
    "model.vae": "null",
    "model.variant": "null",
    "model.resolution": "128",
    "model.bucket_step": "16",
    "model.precision": "fp32",
    "captioner": "blip_tiny",
    "model.judge": "demo:tiny-clip",
    "model.dino": "null",
}
RAY = ("hydra/launcher=ray", "hydra.launcher.ray")  # which dev does not install
FEW_STEPS = {"steps": "2", "sampler.steps": "2"}
ONE_PHOTO = {"stage.img2img.photo": "demo:photos/1.png", "stage.train.prompts": "[A tofu]", "model.judge": "null"}


def commands(page: Path) -> list[str]:
    """The lines of a page that are commands, in order."""
    lines = map(str.strip, page.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line.startswith(COMMAND)]


def files_shown(page: Path) -> dict[str, str]:
    """The YAML files that a page shows: name, from the block's first line, to text."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(# (experiments/\S+\.yaml)\n.*?)^```", text, re.M | re.S)
    return {name: text for text, name in blocks}


def typed(command: str) -> list[str]:
    return shlex.split(command.removeprefix(COMMAND), comments=True)


def shortened(argv: list[str], steps: int) -> list[str]:
    """The same command on the tiny base and a few steps. A run that goes on has its base from the run before."""
    if "--help" in argv or "--cfg" in argv:
        return argv
    values = dict(FEW_STEPS)
    if "stage=train" in argv and not any(word.startswith("stage.prompts=") for word in argv):
        values["stage.prompts"] = "[A tofu]"
    if any(word.startswith(("model=", "experiment=")) for word in argv):
        values |= TINY_BASE
    if not any(word.startswith(("stage=", "resume=")) for word in argv):
        values |= ONE_PHOTO
    if any(word.startswith("resume=") for word in argv):
        values = {"steps": str(steps)}
    if not any(word.startswith("tracker") for word in argv):
        values["tracker"] = "off"
    kept = [word for word in argv if word.partition("=")[0] not in values]
    return kept + [f"{key}={value}" for key, value in values.items()]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A reader's folder: a few uncaptioned pictures in data/TOFU and a photo, me.jpg. No key, no network."""
    pictures = tmp_path / "data" / "TOFU"
    pictures.mkdir(parents=True)
    for file in sorted(demo.TOFU.glob("*.png"))[:4]:
        shutil.copy(file, pictures)
    shutil.copy(demo.PHOTOS / "1.png", tmp_path / "me.jpg")
    (tmp_path / "experiments").mkdir()
    for page in (README, *OTHERS):
        for name, text in files_shown(page).items():
            (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the program sets it: put back afterwards
    return tmp_path


def run(argv: list[str], monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["lora_lab", *argv])
    with pytest.raises(SystemExit) as left:
        cli()
    return left.value.code or 0


@pytest.mark.slow
def test_every_command_of_the_readme_works_in_the_order_it_is_read(desk, monkeypatch, capsys):
    before = results(desk)
    for number, command in enumerate(commands(README)):
        argv = shortened(typed(command), steps=3 + number)
        code = run(argv, monkeypatch)
        said = capsys.readouterr()
        assert code == 0, f"{command}\nran as {shlex.join(argv)}\nand said {said.err[-2000:]}"
        after = results(desk)
        new = after.items() - before.items()
        if "--help" in argv or "--cfg" in argv:
            assert said.out.count("\n") > 20, command
        elif "-m" in argv:
            points = [len(word.split(",")) for word in argv if re.match(r"(rank|lr)=", word)]
            assert len(new) == points[0] * points[1], command
        elif "resume=" not in command:
            ((result, _),) = new
            stage = next((word.removeprefix("stage=") for word in argv if word.startswith("stage=")), "pipeline")
            assert (result.parent / ".hydra" / "config.yaml").is_file()
            assert json.loads(result.read_text(encoding="utf-8"))["stage"] == stage
        before = after
    promised(desk)


def results(desk: Path) -> dict[Path, int]:
    """Every result.json and when it was written: two quick runs may meet in the folder of one second."""
    found = [*desk.glob("outputs/*/*/result.json"), *desk.glob("multirun/*/*/*/result.json")]
    return {file: file.stat().st_mtime_ns for file in found}


def promised(desk: Path) -> None:
    """What the README says will be there in the end."""
    captions = [json.loads(line)["text"] for line in (desk / "data/TOFU/metadata.jsonl").open(encoding="utf-8")]
    assert len(captions) == 4 and all(text.count("HANA_TOFU") == 1 for text in captions)
    names = {file.name for file in (desk / "models" / "lora").iterdir()}
    assert {"HANA_TOFU.safetensors", "HANA_TOFU.1.safetensors", "HANA_TOFU.2.safetensors"} <= names
    jobs = [len(list(sweep.glob("*/lora/HANA_TOFU.safetensors"))) for sweep in desk.glob("multirun/*/*")]
    assert sorted(jobs) == [4, 8] and not any("rank" in name for name in names), "theirs stay where they are"
    made = {p.relative_to(desk).parts[3] for p in desk.glob("outputs/*/*/*")}
    tree = "manifest.json metrics.jsonl loss.png checkpoints samples lora wandb result.json .hydra"
    assert made >= {*tree.split(), "dataset", "check.json", "img2img", "overview.png", "prompts.jsonl", "sheet.png"}


def test_the_readme_shows_each_step_from_pictures_to_photo():
    said = " ".join(commands(README))
    for stage in ("check", "caption", "refine", "train", "img2img"):
        assert f"stage={stage}" in said
    assert commands(README)[0] == COMMAND


def test_no_command_of_the_readme_hides_behind_another():
    blocks = re.findall(r"^ *```.*?^ *```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert "".join(blocks).count(COMMAND) == len(commands(README))


def test_the_korean_readme_has_the_same_commands_and_files():
    korean = HOME / "README.ko.md"
    assert commands(korean) == commands(README)
    assert files_shown(korean) == files_shown(README)


@pytest.mark.parametrize(
    "page",
    # The Korean page has the commands of the English one, which another test compares.
    [page for page in OTHERS if commands(page) and page.name != "README.ko.md"],
    ids=lambda page: page.name,
)
def test_every_command_of_the_other_pages_is_accepted(page, desk):
    config.register()
    for command in commands(page):
        words = [w for w in typed(command) if find_spec("ray") or not w.lstrip("+").startswith(RAY)]
        given = command_line.read_arguments(words)
        assert given.help or command_line.check(given.overrides, given.multirun), command


def test_the_readmes_misspelt_key_gets_the_answer_it_quotes(desk):
    quoted = re.search(r"`python -m (lora_lab [^`]*lrr=1)` answers `([^`]*)`", " ".join(README.read_text().split()))
    path = os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")])
    argv, env = [sys.executable, "-m", *quoted[1].split()], {**os.environ, "PYTHONPATH": path}
    asked = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert (asked.returncode, asked.stderr) == (2, f"lora_lab: {quoted[2]}\n")
    assert not (desk / "outputs").exists()


@pytest.mark.slow
def test_the_bare_command_teaches_the_character(desk, monkeypatch):
    assert run(["tracker=off"], monkeypatch) == 0
    (file,) = desk.glob("outputs/*/*/result.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["scores"]["subject"]["value"] > result["scores_before"]["subject"]["value"] + 0.1
    assert result["scores"]["score"]["value"] > 0.3
    assert Path(result["overview"]).is_file()
