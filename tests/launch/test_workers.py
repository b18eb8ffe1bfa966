"""Tasks in processes that share GPUs; the tasks are shell commands, which inherit the environment of their process."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from lora_lab.launch.workers import places, run_in_process, run_tasks


@pytest.fixture
def run_commands(tmp_path):
    """Run shell commands at places; returns the events: (event, number, place or exit code)."""

    def run(commands, at, interrupt=False):
        events = []

        def on_start(number, place):
            events.append(("start", number, place))
            if interrupt:
                os.kill(os.getpid(), signal.SIGINT)

        tasks = [partial(os.system, f"cd {tmp_path} && {command}") for command in commands]
        try:
            run_tasks(tasks, at, on_start, lambda number, code: events.append(("end", number, code)), tmp_path / "stop")
        finally:
            run.events = events
        return events

    return run


def test_each_process_sees_one_gpu_and_the_next_takes_the_first_free_one(run_commands, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-one,GPU-two")
    waits = "until [ -e 2 ]; do sleep 0.05; done"  # so the first task is the last to end
    tells = "printenv CUDA_VISIBLE_DEVICES >"
    events = run_commands([f"{waits}; {tells} 0", f"{tells} 1", f"{tells} 2"], ["GPU-one", "GPU-two"])
    assert [(tmp_path / name).read_text() for name in "012"] == ["GPU-one\n", "GPU-two\n", "GPU-two\n"]
    assert [event for event in events if event[0] == "start"] == [
        ("start", 0, "GPU-one"), ("start", 1, "GPU-two"), ("start", 2, "GPU-two"),
    ]  # fmt: skip
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-one,GPU-two"


def test_a_killed_process_is_reported_and_the_next_one_starts(run_commands):
    events = run_commands(["kill -9 $PPID; sleep 9", "true"], [None])
    assert events == [("start", 0, None), ("end", 0, -9), ("start", 1, None), ("end", 1, 0)]


def test_after_ctrl_c_running_tasks_finish_and_no_other_starts(run_commands, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_commands(["sleep 0.5; touch whole", "touch never"], [None], interrupt=True)
    assert [event[:2] for event in run_commands.events] == [("start", 0), ("end", 0)]
    assert (tmp_path / "whole").exists() and (tmp_path / "stop").exists() and not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("given", "wanted", "devices", "there"),
    [
        (None, None, {"auto"}, ["0", "1"]),
        (None, 1, {"cuda"}, ["0"]),
        (None, 3, {"auto", "cuda"}, ["0", "1", "0"]),
        ("3,1", None, {"auto"}, ["3", "1"]),
        ("GPU-8a2f, GPU-11c0", None, {"auto"}, ["GPU-8a2f", "GPU-11c0"]),
        ("5,6,-1,7", None, {"auto"}, ["5", "6"]),
        (None, None, {"cuda:1"}, [None]),
        (None, None, {"cpu"}, [None]),
        (None, 2, {"cpu"}, [None, None]),
    ],
)
def test_there_is_a_worker_for_each_visible_gpu(given, wanted, devices, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert places(wanted, devices) == there


def test_without_a_gpu_there_is_one_place(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert places(None, {"auto"}) == [None]


def test_run_in_process_uses_a_process_that_ends():
    other = run_in_process(os.getpid)
    assert other != os.getpid() and not Path(f"/proc/{other}").exists()
