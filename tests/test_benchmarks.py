"""The benchmarks run to their end on a CPU, and their figures are complete."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sdxl_structure import FULL

from benchmarks.work import training_flops

HOME = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_step_of_sdxl_has_14_teraflops():
    assert training_flops(FULL, 1024) == pytest.approx(14.19e12, rel=1e-3)


def rows_of(table: Path, *arguments: str) -> list[dict]:
    path = os.pathsep.join([str(HOME), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", *arguments]
    subprocess.run(command, cwd=HOME, env=os.environ | {"PYTHONPATH": path}, check=True)
    return json.loads(table.read_text())["rows"]


@pytest.mark.slow
def test_every_row_of_a_dry_run_has_figures(tmp_path):
    asked = ("--dry", "--kernels", "--steps", "4", "--memory", "fast", "--batch", "1", "2")
    rows = rows_of(tmp_path / "table.json", "benchmarks", str(tmp_path), *asked)
    assert [row["name"] for row in rows] == ["fast-1", "fast-2"]
    assert all(row["steps"] == 2 and row["median_ms"] > 0 and row["seconds_to_first_step"] > 1 for row in rows)
    assert all(row["kernels"]["kernels"] > 1000 and row["kernels"]["by_kind"]["convolution"][0] > 0 for row in rows)
    assert (tmp_path / "table.md").read_text().count("\n| fast-") == 2


@pytest.mark.slow
def test_a_sweep_is_timed_with_both_launchers_and_trains_the_same_loras(tmp_path):
    asked = ("--dry", "--points", "rank=2,4", "--steps", "2")
    packed, basic = rows_of(tmp_path / "sweep.json", "benchmarks.sweep", str(tmp_path), *asked)
    assert (packed["launcher"], packed["jobs"], basic["jobs"]) == ("packed", 2, 2)
    assert packed["seconds"] > packed["seconds_to_first_step"] > 1 and packed["losses_apart"] is None
    assert basic["losses_apart"] < 1e-4 and basic["loras_apart"] < 1e-3  # sums in another order


@pytest.mark.slow
def test_the_first_page_of_a_sweep_is_timed_and_has_every_image(tmp_path):
    command = [sys.executable, "-m", "benchmarks.page", str(tmp_path), "--runs", "2", "--images", "100", "--size", "16"]
    lines = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(":")[0] for line in lines if "by the clock" in line] == ["first page", "again"]
    assert len(list((tmp_path / "sweep/page").glob("*/*.png"))) == 200
