"""hydra/launcher=packed with several worker processes, as on several GPUs; here two on a CPU."""

import json
import os
import signal
from pathlib import Path

import pytest
from sweep_runs import NO_JUDGE, SHORT, assert_same_run, ended, interrupt, pictures, start, wait_for

pytestmark = pytest.mark.slow

KINDS = ("lr=1e-3,1e30", "adapter=lora,dora")  # jobs 0 and 2 are a pack; 1 and 3 train alone
ONE, TWO = (("hydra/launcher=packed", f"hydra.launcher.workers={count}") for count in (1, 2))


@pytest.fixture
def work(tmp_path):
    pictures(tmp_path)
    return tmp_path


def last_step(run: Path) -> int:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def test_two_workers_write_what_one_process_writes_and_label_every_line(work):
    code, _, err = ended(start(work, *SHORT, NO_JUDGE, *KINDS, *ONE))
    assert code == 1 and err.count("lr=1e+30") == 2
    (work / "sweep").rename(work / "one")
    code, out, err = ended(start(work, *SHORT, NO_JUDGE, *KINDS, *TWO))
    assert code == 1
    for job in "01":
        assert_same_run(work / "sweep" / job, work / "one" / job)
    for job in "23":
        assert "step 2 is nan" in json.loads((work / "sweep" / job / "failed.json").read_text())["error"]
        assert "step 2 is nan" in err.split(f"sweep/{job}: ")[1].splitlines()[0]
    plan, spoken = (part.splitlines() for part in out.split("workers, which take the next one when they are free:"))
    assert plan == ["3 groups for 2 "] and spoken[1].strip() == "#0,2 train together"
    assert spoken[2].strip() == "#1 trains alone, since its adapter is no LoRA"
    *lines, _, page = (line for line in spoken[4:] if "HYDRA" not in line)
    assert page == "compare the runs: sweep/index.html"
    assert all(line.startswith(("#0,2 ", "#1 ", "#3 ")) for line in lines)
    assert "step/s" not in err


@pytest.mark.parametrize("children", [True, False], ids=["at a terminal", "kill -INT"])
def test_ctrl_c_lets_every_worker_write_its_checkpoints(work, children):
    sweep = work / "sweep"
    started = start(work, *SHORT, NO_JUDGE, "lr=1e-3,1e-2,1e-4", "steps=3000", *TWO, "hydra.launcher.max_jobs=1")
    both = [checkpoint(sweep / job, 3) for job in "01"]
    code, _, err = interrupt(started, signal.SIGINT, *both, children=children)
    assert code == 1 and "lora_lab: stopped; resume with: python -m lora_lab resume=sweep\n" in err
    assert "Traceback" not in err
    for job in "01":
        assert checkpoint(sweep / job, last_step(sweep / job)).is_dir(), "the last step is in a checkpoint"
    assert len(list(sweep.glob("*/job.json"))) == 2, "no other job is started"
    assert not list(sweep.rglob("failed.json")) and not (sweep / "stop").exists()


def test_the_jobs_of_a_killed_worker_have_failed_and_can_be_expand_resume(work):
    sweep = work / "sweep"
    started = start(work, *SHORT, NO_JUDGE, "lr=1e-3,1e-2", "batch_size=1,2", *TWO)
    wait_for(started, checkpoint(sweep / "0", 3))
    os.kill(json.loads((sweep / "0" / "job.json").read_text())["pid"], signal.SIGKILL)
    code, _, err = ended(started)
    assert code == 1 and err.count("signal 9") == 2
    for job in "01":
        assert "signal 9" in json.loads((sweep / job / "failed.json").read_text())["error"]
    for job in "23":
        assert (sweep / job / "result.json").is_file()
    code, out, err = ended(start(work, "resume=sweep", "hydra.launcher.workers=1"))
    assert code == 0, err
    assert "sweep/2 is done" in out and "sweep/3 is done" in out and not list(sweep.rglob("failed.json"))
    assert all(last_step(sweep / job) == 30 for job in "0123")
