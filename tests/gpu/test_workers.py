"""A sweep on several GPUs: each has a process of its own, and what it trains is what one GPU trains.

python -m pytest tests/gpu/test_workers.py -m gpu -n 0"""

import json
import re
import time

import pytest
import torch
from tiny_runs import validation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SWEEP = (
    "-m", "stage=train", "model.precision=bf16", "memory=fast", "tracker=off", "model.judge=null", "stage.prompts=[]",
    "stage.validation_loss_every=40", "steps=40", "rank=4,16", "lr=1e-3,3e-3", "hydra/launcher=packed",
)  # fmt: skip


def test_every_gpu_takes_a_share(exit_code_of, capfd, tmp_path):
    began = time.perf_counter()
    code = exit_code_of(*SWEEP, "hydra.sweep.dir=shared")
    said = capfd.readouterr()
    assert code == 0, said.err
    shared = time.perf_counter() - began
    assert set(re.findall(r"begins on GPU (\d)", said.out)) == {"0", "1"} and "can't be captured" not in said.out
    assert exit_code_of(*SWEEP, "hydra.launcher.workers=1", "hydra.sweep.dir=one") == 0
    assert "begins" not in capfd.readouterr().out
    of = {sweep: [validation(tmp_path / sweep / str(job)) for job in range(4)] for sweep in ("shared", "one")}
    with capfd.disabled():
        print("MEASURED " + json.dumps({"seconds": [shared, time.perf_counter() - began - shared], "losses": of}))
    for ours, theirs in zip(of["shared"], of["one"], strict=True):
        assert ours == pytest.approx(theirs, rel=0.01)
