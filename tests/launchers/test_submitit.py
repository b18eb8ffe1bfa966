"""Submitit without a cluster: its jobs are processes of this machine."""

import json

import pytest
from sweep_runs import NO_JUDGE, SHORT, ended, pictures, start

pytestmark = pytest.mark.slow


def test_the_jobs_of_a_sweep_run_in_processes_of_their_own(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    pictures(tmp_path)
    few = ("lr=1e-3,1e30", "steps=3", "hydra/launcher=submitit_local")
    code, out, err = ended(start(tmp_path, *SHORT, NO_JUDGE, *few))
    assert code == 1 and "lora_lab: sweep/1: the loss of step 2 is nan" in err
    assert json.loads((tmp_path / "sweep" / "0" / "result.json").read_text())["steps"] == 3
    assert "training  3 steps" not in out, "what they say is in their own logs"
    logs = "".join(log.read_text() for log in tmp_path.glob("sweep/.submitit/*/*_log.out"))
    assert "#0   training  3 steps" in logs
