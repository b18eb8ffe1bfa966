"""The wheel is what most people get: with its configuration, recipes and demo, it runs away from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
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


@pytest.mark.slow
def test_the_wheel_has_the_packed_launcher(wheel, installed, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        plugin = [name for name in archive.namelist() if name.startswith("hydra_plugins/")]
    assert plugin == ["hydra_plugins/lora_lab/__init__.py"], "a file hydra_plugins/__init__.py would hide other plugins"
    sweep = lora_lab(
        installed, tmp_path, "-m", "stage=check", "seed=0,1", "hydra/launcher=packed", "hydra.sweep.dir=sweep"
    )
    assert sweep.returncode == 0, sweep.stderr
    assert "#0 trains alone, since only stage=train is packed" in sweep.stdout
    assert (tmp_path / "sweep" / "1" / "result.json").is_file()


def test_an_editable_install_finds_the_packed_launcher(tmp_path):
    """With the path that an editable install adds, and without the rest of this environment's editable installs."""
    build = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
import site
site.addsitedir({str(tmp_path / "site")!r})
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
for launcher in Plugins.instance().discover(Launcher):
    print(launcher.__module__, __import__(launcher.__module__, fromlist=["x"]).__file__)
"""
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]}  # read without its .pth files
    found = subprocess.run([sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert f"hydra_plugins.lora_lab {CHECKOUT}/hydra_plugins/lora_lab/__init__.py\n" in found.stdout
    assert "basic_launcher" in found.stdout


@pytest.mark.slow
def test_the_installed_package_checks_its_own_demo(installed, tmp_path):
    checked = lora_lab(installed, tmp_path, "stage=check")
    assert checked.returncode == 0, checked.stderr
    assert str(installed / "lora_lab" / "demo" / "tofu") in checked.stdout.replace("\n", "")
    (result,) = tmp_path.glob("outputs/*/*/result.json")
    assert json.loads(result.read_text(encoding="utf-8"))["findings"]["pictures"] == 24
