"""Processes that take turns on GPUs: with commands of the shell, which see what their process sees."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from lora_lab.launch.workers import places, run_in_process, run_tasks


@pytest.fixture
def done(tmp_path):
    """Do commands at places; returns what was told: (what, number, place or exit code)."""

    def do(commands, at, interrupt=False):
        told = []

        def begins(number, place):
            told.append(("begins", number, place))
            if interrupt:
                os.kill(os.getpid(), signal.SIGINT)

        tasks = [partial(os.system, f"cd {tmp_path} && {command}") for command in commands]
        try:
            run_tasks(tasks, at, begins, lambda number, code: told.append(("ended", number, code)), tmp_path / "stop")
        finally:
            do.told = told
        return told

    return do


def test_each_process_sees_its_gpu_alone_and_the_next_takes_the_one_that_is_free(done, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-one,GPU-two")
    waits = "until [ -e 2 ]; do sleep 0.05; done"  # the first takes so long that both others go to the second place
    tells = "printenv CUDA_VISIBLE_DEVICES >"
    told = done([f"{waits}; {tells} 0", f"{tells} 1", f"{tells} 2"], ["GPU-one", "GPU-two"])
    assert [(tmp_path / name).read_text() for name in "012"] == ["GPU-one\n", "GPU-two\n", "GPU-two\n"]
    assert [line for line in told if line[0] == "begins"] == [
        ("begins", 0, "GPU-one"), ("begins", 1, "GPU-two"), ("begins", 2, "GPU-two"),
    ]  # fmt: skip
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-one,GPU-two"


def test_a_process_that_is_killed_is_told_of_and_the_next_begins(done):
    told = done(["kill -9 $PPID; sleep 9", "true"], [None])
    assert told == [("begins", 0, None), ("ended", 0, -9), ("begins", 1, None), ("ended", 1, 0)]


def test_after_ctrl_c_none_begins_and_those_that_run_are_waited_for(done, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        done(["sleep 0.5; touch whole", "touch never"], [None], interrupt=True)
    assert [line[:2] for line in done.told] == [("begins", 0), ("ended", 0)]
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
def test_a_worker_for_each_gpu_that_may_be_used(given, wanted, devices, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert places(wanted, devices) == there


def test_without_a_gpu_there_is_one_place(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert places(None, {"auto"}) == [None]


def test_what_is_asked_elsewhere_is_answered_by_a_process_that_ends():
    other = run_in_process(os.getpid)
    assert other != os.getpid() and not Path(f"/proc/{other}").exists()
