"""What a user is told, and what is left, where a signal or the end of the terminal ends a run, in real processes."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from sweep_runs import LIMIT, NO_JUDGE, SHORT, assert_same_run, ended, interrupt, pictures, start, wait_for

TRAIN = (*(word for word in SHORT if word not in ("-m", "hydra.sweep.dir=sweep")), NO_JUDGE, "hydra.run.dir=run")
RESUME = "resume with: python -m lora_lab resume=run"


@pytest.fixture
def work(tmp_path):
    pictures(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.slow
def test_a_run_that_is_ended_at_its_start_says_how_to_go_on(work, number):
    code, _, err = interrupt(start(work, *TRAIN), number, work / "run" / ".hydra" / "overrides.yaml")
    reason = "stopped" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    assert (code, err.strip()) == (1, f"lora_lab: {reason}; {RESUME}")


@pytest.mark.slow
def test_nohup_is_respected(work):
    words = ("-m", "lora_lab", "stage=check", "dataset=folder", "dataset.root=tofu", "hydra.run.dir=run")
    run = subprocess.Popen(["nohup", sys.executable, *words], cwd=work, start_new_session=True)
    wait_for(run, work / "run" / ".hydra")
    run.send_signal(signal.SIGHUP)
    assert run.wait(60) == 0


@pytest.mark.slow
def test_a_terminal_that_is_closed_leaves_a_checkpoint(work):
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "lora_lab", *TRAIN, "stage.checkpoint_every=0", "steps=20000"],
        cwd=work, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    metrics, limit = work / "run" / "metrics.jsonl", time.monotonic() + LIMIT
    while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < limit:
        if select.select([ours], [], [], 0.1)[0]:
            os.read(ours, 100_000)  # else the terminal is full
    os.close(ours)  # hangs up
    assert run.wait(60) == 1
    assert len([*(work / "run" / "checkpoints").iterdir()]) == 1
    assert json.loads(next(work.glob("run/checkpoints/*/training.json")).read_text())["step"] >= 1


@pytest.mark.slow
def test_a_second_signal_and_one_in_the_last_pictures_say_how_to_go_on(work):
    run = start(work, *TRAIN, "steps=2000")
    wait_for(run, work / "run" / "checkpoints" / "step-000002")
    for _ in range(2):
        run.send_signal(signal.SIGINT)
        time.sleep(0.05)  # two that are pending are one
    code, _, err = ended(run)
    assert code == 1 and RESUME in err and "Traceback" not in err
    many = [word for word in TRAIN if not word.startswith(("stage.seeds", "hydra.run.dir"))]
    many = (*many, f"stage.seeds={[*range(300)]}".replace(" ", ""), "hydra.run.dir=last", "steps=2")
    code, _, err = interrupt(start(work, *many), signal.SIGTERM, work / "last" / "lora" / "HANA_TOFU.safetensors")
    assert code == 1 and err.strip().endswith("lora_lab: stopped by SIGTERM; " + RESUME.replace("=run", "=last"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib hydra.launcher.n_jobs=2", "packed hydra.launcher.workers=2"])
def test_the_workers_of_a_killed_command_end_and_the_sweep_goes_on(work, launcher):
    if launcher.startswith("joblib"):
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = (*SHORT, NO_JUDGE, "lr=1e-3,2e-3", *f"hydra/launcher={launcher}".split())
    run = start(work, *command)
    jobs = [work / "sweep" / name for name in "01"]
    wait_for(run, *(job / "checkpoints" / "step-000003" for job in jobs))
    workers = [json.loads((job / ".lock.json").read_text())["pid"] for job in jobs]
    run.kill()
    ended(run)
    assert run.pid not in workers
    limit = time.monotonic() + 20
    while any(map(_is_alive, workers)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(map(_is_alive, workers))
    assert ended(start(work, "resume=sweep"))[0] == 0
    assert ended(start(work, *command, "hydra.sweep.dir=unbroken"))[0] == 0
    for job in jobs:
        assert_same_run(job, work / "unbroken" / job.name)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
