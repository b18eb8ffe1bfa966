import logging
import os
import sys

import pytest

# Before anything imports torch: the models of the tests are so small that threads only wait for each other, and on a
# busy machine they do so for minutes. No test may depend on the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def composed():
    """`composed("stage=train", "lr=1e-3")` returns the configuration of these overrides."""
    from lora_lab.launch.config import compose

    return compose


@pytest.fixture
def exit_code_of(tmp_path, monkeypatch):
    """A function that runs a command line in an empty folder and returns the exit code."""
    from hydra.core.global_hydra import GlobalHydra

    from lora_lab.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora_lab"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # restored afterwards, because the program sets it
    handlers, level = logging.root.handlers[:], logging.root.level
    yield lambda *argv: main(list(argv))
    logging.root.handlers[:], logging.root.level = (
        handlers,
        level,
    )  # closes Hydra's log file
    GlobalHydra.instance().clear()


@pytest.fixture
def type_in(exit_code_of, capsys):
    """As `exit_code_of`, but returns (exit code, stdout, stderr)."""
    return lambda *argv: (exit_code_of(*argv), *capsys.readouterr())
