"""The wheel is what most people get: with its configuration, recipes and demo, it runs away from the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lora_lab import __version__

pytest.importorskip("build", reason="python -m build makes the wheel: pip install -e '.[dev]'")
pytest.importorskip("hatchling", reason="hatchling makes the wheel: pip install -e '.[dev]'")

CHECKOUT = Path(__file__).resolve().parents[1]
MOST = 40 * 2**20  # bytes; the demo's weights are nearly all of it


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with nothing but the package in it."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def lora_lab(installed, where, *argv):
    """Run the installed package in `where`; PYTHONPATH comes before an editable install of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "lora_lab", *argv], cwd=where, env=environment, capture_output=True, text=True
    )


def test_the_wheel_holds_configuration_recipes_and_demo(wheel):
    assert wheel.name == f"lora_lab-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("conf", "experiments"):
        expected = {f"lora_lab/{f.relative_to(CHECKOUT).as_posix()}" for f in (CHECKOUT / folder).rglob("*.yaml")}
        assert expected <= names
    package = CHECKOUT / "lora_lab"
    files = [*(package / "demo").rglob("*"), *(package / "board").iterdir()]
    missing = {
        f.relative_to(CHECKOUT).as_posix() for f in files if f.is_file() and "__pycache__" not in f.parts
    } - names
    assert missing == set()
    assert not [name for name in names if name.startswith(("tests/", "docs/")) or "__pycache__" in name]
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB in {len(names)} files")
    assert wheel.stat().st_size < MOST


def test_the_installed_package_reads_its_own_configuration(installed, tmp_path):
    # a word in the wheel's copy alone: were the checkout's read, it would not be there
    config = installed / "lora_lab" / "conf" / "model" / "tiny.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("steps: 300", "steps: 299"), encoding="utf-8")
    try:
        shown = lora_lab(installed, tmp_path, "--cfg", "job", "stage=train")
    finally:
        config.write_text(text, encoding="utf-8")
    assert shown.returncode == 0, shown.stderr
    assert "steps: 299" in shown.stdout
    recipe = lora_lab(installed, tmp_path, "--cfg", "job", "stage=train", "experiment=smoke")
    assert recipe.returncode == 0 and "steps: 6" in recipe.stdout


def test_the_installed_package_checks_its_own_demo(installed, tmp_path):
    checked = lora_lab(installed, tmp_path, "stage=check")
    assert checked.returncode == 0, checked.stderr
    assert str(installed / "lora_lab" / "demo" / "tofu") in checked.stdout.replace("\n", "")
    (result,) = tmp_path.glob("outputs/*/*/result.json")
    assert json.loads(result.read_text(encoding="utf-8"))["findings"]["pictures"] == 24
