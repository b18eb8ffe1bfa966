"""The files of a sweep's jobs and what resume= does with them, with stage=convert, which takes no time."""

import json
import os
import threading

import pytest

from lora_lab.errors import InputError
from lora_lab.launch.command_line import all_points
from lora_lab.runs import claimed, create_folder, score_of

SWEEP = ("-m", "stage=convert", "dataset=folder", "dataset.root=empty,full", "stage.form=csv", "hydra.sweep.dir=sweep")


def caption(folder):
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "A HANA_TOFU"}) + "\n")


@pytest.mark.slow
def test_a_resumed_sweep_repeats_failed_jobs_and_skips_finished_ones(type_in, tmp_path):
    caption(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    code, _, err = type_in(*SWEEP)
    failed, done = tmp_path / "sweep/0/failed.json", tmp_path / "sweep/1/result.json"
    assert code == 2 and json.loads(failed.read_text())["error"].startswith("no captions in empty")
    assert err.count("\n") == 1, "it is reported once"
    before = done.stat()
    code, _, err = type_in("resume=sweep")
    assert code == 2 and "no captions in empty" in err and failed.is_file()
    caption(tmp_path / "empty")
    code, out, err = type_in("resume=sweep")
    assert (code, err) == (0, "") and not failed.exists() and (tmp_path / "sweep/0/result.json").is_file()
    assert "\nsweep/1 is done" in f"\n{out}" and done.stat().st_ino == before.st_ino
    assert not (tmp_path / "sweep" / "stop").exists()


@pytest.mark.slow
def test_a_finished_job_is_repeated_with_new_settings_and_its_old_result_is_kept(type_in, tmp_path):
    caption(tmp_path / "full")
    caption(tmp_path / "empty")
    assert type_in(*SWEEP)[0] == 0
    code, out, _ = type_in("resume=sweep", "stage.form=txt")
    assert code == 0 and "is done" not in out and (tmp_path / "full" / "a.txt").is_file()
    assert (
        json.loads((tmp_path / "sweep/1/result.json").read_text())["written"]
        != json.loads((tmp_path / "sweep/1/result.before.json").read_text())["written"]
    )
    assert "is done" in type_in("resume=sweep", "stage.form=txt")[1]


def test_a_folder_that_has_a_sweep_is_not_overwritten(type_in, tmp_path):
    caption(tmp_path / "full")
    caption(tmp_path / "empty")
    assert type_in(*SWEEP)[0] == 0
    code, out, err = type_in(*SWEEP)
    assert code == 2 and out == ""
    assert err == "lora_lab: sweep has a sweep already: name another folder, or continue it with resume=sweep\n"


def test_a_sweep_is_not_resumed_while_one_of_its_jobs_runs(type_in, tmp_path):
    caption(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert type_in(*SWEEP)[0] == 2
    for job in ("sweep/0", "sweep"):  # a job whose sweep was killed; the sweep
        with claimed(tmp_path / job):
            code, out, err = type_in("resume=sweep")
        assert (code, out) == (2, "") and f"{job} is in use by process {os.getpid()} on " in err


def test_a_job_does_not_overwrite_the_folder_of_another_job(type_in, tmp_path):
    caption(tmp_path / "full")
    caption(tmp_path / "empty")
    code, _, err = type_in(*SWEEP, "hydra.sweep.subdir=one")
    assert code == 2 and "sweep/one is the folder of job 0: hydra.sweep.subdir must tell the jobs apart" in err
    assert (tmp_path / "sweep/one/result.json").is_file() and not (tmp_path / "sweep/one/failed.json").exists()


def test_sweeps_that_start_in_the_same_second_get_different_folders(tmp_path):
    claimed, folder = [], tmp_path / "2026-01-01" / "12-00-00"
    threads = [threading.Thread(target=lambda: claimed.append(create_folder(folder, False, "key"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(claimed)) == 8 and all(f.is_dir() for f in claimed) and folder in claimed
    assert folder.with_name("12-00-00-1") in claimed
    with pytest.raises(InputError, match="not a folder"):
        (tmp_path / "file").touch()
        create_folder(tmp_path / "file", True, "hydra.sweep.dir")


def test_a_sweep_without_a_started_job_leaves_no_folder(type_in, tmp_path):
    code, _, err = type_in("-m", "stage=check", "seed=0,1", "hydra.sweeper.max_batch_size=0")
    assert code != 0 and "the sweep was aborted" in err and "resume=" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("result", "score"),
    [
        ({"scores": {"score": {"value": 0.61, "low": 0.5, "high": 0.7}, "subject": {"value": 1.0}}}, 0.61),
        ({"scores": None, "loss": 0.1}, None),
        ({"captions": 1}, None),
    ],
)
def test_the_score_of_a_run_is_its_combined_score_and_never_its_loss(result, score):
    assert score_of(result) == score


def test_a_sweep_that_searches_has_no_points_to_list():
    hydra = {"sweeper": {"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"}}
    assert all_points(hydra | {"overrides": {"task": ["lr=1e-3,1e-4"]}}, loader=None) == []
