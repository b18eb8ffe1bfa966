"""Real sweeps on the tiny base model: what their jobs write for the page, and what the page shows."""

import json
from pathlib import Path

import pytest
from tiny_runs import interrupt_at

from lora_lab.board.read import read_sweep
from lora_lab.launch.sweep_folder import write_failure

pytestmark = pytest.mark.slow

SWEEP = ("-m", "stage=train", "tracker=off", "model.judge=null", "batch_size=1", "sampler.steps=2", "cache=null",
         "stage.prompts=['A {trigger}']", "stage.validate_every=1", "steps=2", "rank=2")  # fmt: skip


@pytest.fixture
def run(exit_code_of):
    return exit_code_of


def the_sweep() -> Path:
    (folder,) = Path("multirun").glob("*/*")
    return folder


def test_a_sweep_ends_with_its_page_and_a_failed_job_is_on_it(run, capsys):
    tracked_by_wandb = [word for word in SWEEP if word != "tracker=off"] + ["tracker=wandb", "tracker.mode=offline"]
    assert run(*tracked_by_wandb, "lr=1e-3,1e20") == 1
    folder = the_sweep()
    (comparison,) = folder.glob("wandb/offline-run-*")  # printed once, after everything else
    *_, page, tracked = capsys.readouterr().out.splitlines()
    assert page == f"compare the runs: {folder / 'index.html'}"
    assert tracked.startswith("tracking offline (as configured)") and tracked.endswith(f"wandb sync {comparison}")
    good, bad = read_sweep([folder]).runs
    assert (good.status, bad.status) == ("done", "failed") and "too large for stage.save_dtype" in bad.error
    assert (good.settings["lr"], bad.settings["lr"], good.settings["rank"]) == (1e-3, 1e20, 2)
    assert {(p.step, p.prompt, p.seed) for p in good.pictures} == {(step, "A HANA_TOFU", 0) for step in (-1, 1, 2)}
    assert len(good.loss) == 2 and good.seconds > 0
    page = (folder / "index.html").read_text()
    assert bad.error in page and f"lora={folder}/0" in page and str(Path.cwd()) not in page
    assert (folder / "page/0/000002-p0-s0.png").is_file() and (folder / "comparison.png").is_file()


def test_a_job_that_succeeds_later_is_no_longer_failed(run):
    folder = Path("multirun/day/time")
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "failed.json").write_text('{"error": "the machine was switched off"}')
    assert run(*SWEEP, "lr=1e-3", f"hydra.sweep.dir={folder}") == 0
    assert not (folder / "0" / "failed.json").exists()
    assert [r.status for r in read_sweep([folder]).runs] == ["done"]


def test_after_ctrl_c_a_run_is_unfinished_on_the_page_and_not_failed(run, monkeypatch):
    with monkeypatch.context() as once:
        interrupt_at(1, once)
        assert run(*SWEEP, "lr=1e-3,1e-4") == 1
    folder = the_sweep()
    assert not list(folder.glob("*/failed.json")) and not list(folder.rglob("wandb"))
    assert [(r.status, r.step) for r in read_sweep([folder]).runs] == [("unfinished", 1), ("missing", 0)]
    assert '"status":"unfinished"' in (folder / "index.html").read_text()
    write_failure(folder / "0", "the machine was switched off", 1)
    assert run(f"resume={folder / '0'}") == 0  # alone, and yet the sweep's page has it
    assert [r.status for r in read_sweep([folder]).runs] == ["done", "missing"]
    assert '"status":"unfinished"' not in (folder / "index.html").read_text()


def test_a_sweep_that_trains_nothing_has_no_page(run, capsys):
    assert run("-m", "stage=check", "seed=1,2", "tracker=off") == 0
    assert not (the_sweep() / "index.html").exists() and "compare the runs" not in capsys.readouterr().out
    assert json.loads((the_sweep() / "0/result.json").read_text())["stage"] == "check"
