"""A pack on a GPU: captured, in bf16, each LoRA is what it is alone.

python -m pytest tests/gpu/test_pack.py -m gpu -n 0"""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import validation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SWEEP = (
    "-m", "stage=train", "model.precision=bf16", "memory=fast", "tracker=off", "model.judge=null", "sampler.steps=20",
    "stage.validate_every=100", "stage.validation_loss_every=100", "steps=100", "rank=4,16", "lr=1e-3,3e-3",
)  # fmt: skip
PACKED, COMPILED = "hydra/launcher=packed", "compile=blocks"
SWEEPS = {"alone": (), "alone_compiled": (COMPILED,), "packed": (PACKED,), "packed_compiled": (PACKED, COMPILED)}


def apart(job: Path, other: Path) -> float:
    """Mean difference of two runs' pictures, of 255."""
    one, alike = map(pictures, (job, other))
    return float(abs(one - alike).mean())


def pictures(job: Path) -> np.ndarray:
    files = sorted((job / "samples/step-000100").glob("*.png"))
    return np.stack([np.asarray(Image.open(file).convert("RGB"), dtype=float) for file in files])


def test_loras_of_a_pack_look_as_they_do_alone(exit_code_of, capsys, tmp_path):
    """No further from it than compiled code, which rounds the same numbers otherwise, is from what is not compiled."""
    for name, how in SWEEPS.items():  # a job's graphs must not be in the way of the next one's
        code = exit_code_of(*SWEEP, *how, f"hydra.sweep.dir={name}")
        said = capsys.readouterr()
        assert code == 0, said.err
        assert "can't be captured" not in said.out and ("4 jobs on one base" in said.out) == (PACKED in how)
    measured = []
    for job in map(str, range(4)):
        of = {name: tmp_path / name / job for name in SWEEPS}
        measured.append(
            {
                "losses": {name: validation(folder)[100] for name, folder in of.items()},
                "packed": [apart(of["packed"], of["alone"]), apart(of["packed_compiled"], of["alone_compiled"])],
                "rounded": [apart(of["alone"], of["alone_compiled"])],
            }
        )
        for name in ("packed", "packed_compiled"):
            assert validation(of[name]) == pytest.approx(validation(of["alone"]), rel=0.01)
    with capsys.disabled():
        print("MEASURED " + json.dumps(measured))
    packed, rounded = (statistics.mean(x for job in measured for x in job[of]) for of in ("packed", "rounded"))
    assert packed < 1.5 * rounded


def test_a_pack_that_the_memory_is_not_enough_for_goes_on_in_halves(exit_code_of, capsys, tmp_path):
    """The memory really ends: what this process may take lies between what four jobs need and what two do."""
    how = (*SWEEP[:-3], "steps=20", "rank=16", "lr=1e-3,2e-3,3e-3,4e-3", "batch_size=16", PACKED)
    needed = []
    for most in (2, 4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert exit_code_of(*how, f"hydra.launcher.max_jobs={most}", f"hydra.sweep.dir=most{most}") == 0
        needed.append(torch.cuda.max_memory_reserved())
    capsys.readouterr()
    share = sum(needed) / 2 / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        assert exit_code_of(*how, "hydra.launcher.max_jobs=4", "hydra.sweep.dir=halved") == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().out
    with capsys.disabled():
        print("MEASURED " + json.dumps({"needed_mib": [n // 2**20 for n in needed]}))
    assert "training goes on with at most 2 at a time" in said
    for job in range(4):
        assert validation(tmp_path / f"halved/{job}") == pytest.approx(validation(tmp_path / f"most4/{job}"), rel=0.01)
