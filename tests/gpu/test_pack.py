"""A pack on a GPU: captured, in bf16, each LoRA is what it is alone.

python -m pytest tests/gpu/test_pack.py -m gpu -n 0"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SWEEP = (
    "-m", "stage=train", "model.precision=bf16", "memory=fast", "tracker=off", "model.judge=null", "sampler.steps=20",
    "stage.validate_every=100", "stage.validation_loss_every=100", "steps=100", "rank=4,16", "lr=1e-3,3e-3",
)  # fmt: skip


def losses(job: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(job, "validation.jsonl").read_text().splitlines()]


def pictures(job: str) -> np.ndarray:
    files = sorted(Path(job, "samples/step-000100").glob("*.png"))
    return np.stack([np.asarray(Image.open(file).convert("RGB"), dtype=float) for file in files])


@pytest.mark.parametrize("compiled", ["off", "blocks"])
def test_loras_of_a_pack_look_as_they_do_alone(exit_code_of, capsys, compiled):
    how = (*SWEEP, f"compile={compiled}")
    assert exit_code_of(*how, "hydra/launcher=packed", "hydra.sweep.dir=packed") == 0
    said = capsys.readouterr().out
    assert "4 jobs on one base" in said and "can't be recorded" not in said
    assert exit_code_of(*how, "hydra.sweep.dir=alone") == 0
    assert exit_code_of(*how, "hydra.sweep.dir=again") == 0
    measured = []
    for job in range(4):
        packed, alone, again = (losses(f"{sweep}/{job}") for sweep in ("packed", "alone", "again"))
        assert packed == pytest.approx(alone, rel=0.01)
        one, other, repeated = (pictures(f"{sweep}/{job}") for sweep in ("packed", "alone", "again"))
        # Attention's backward pass adds up in no fixed order: two runs alone are not the same pictures either.
        apart, noise = abs(one - other).mean(), abs(other - repeated).mean()
        measured.append({"losses": [packed[-1], alone[-1], again[-1]], "pixels": [apart, noise]})
        assert apart < max(2 * noise, 4)  # of 255
    print("MEASURED " + json.dumps({"compile": compiled, "jobs": measured}))
