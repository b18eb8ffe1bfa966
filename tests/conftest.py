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
    """`composed("stage=train", "lr=1e-3")`: the configuration that the command line would give."""
    from lora_lab.config import compose

    return compose


@pytest.fixture
def type_in(tmp_path, monkeypatch, capsys):
    """Type arguments in an empty folder; returns (exit code, stdout, stderr)."""
    from hydra.core.global_hydra import GlobalHydra

    from lora_lab.__main__ import _exit_code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora_lab"])

    def run(*argv):
        code = _exit_code(list(argv))
        return code, *capsys.readouterr()

    handlers, level = logging.root.handlers[:], logging.root.level
    yield run
    logging.root.handlers[:], logging.root.level = handlers, level  # Hydra's log into a folder that goes
    GlobalHydra.instance().clear()
