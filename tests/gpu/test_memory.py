"""The memory that the plan of a run expects, against what the card shows while the run goes on, at SDXL's size.

    python -m pytest tests/gpu/test_memory.py -m gpu -n 0 -s

Each row prints a line `MEASURED {json}`. LORA_LAB_GPU_DRY=1 runs the same lines on a CPU, where nothing is compared."""

import json

import pytest
import torch
from gpu_memory import DRY, free

from benchmarks.prepare import Bench, prepare
from benchmarks.row import gpu_memory, measure
from lora_lab.launch.config import compose
from lora_lab.settings.schema import OptimizerTraits
from lora_lab.training.memory import expected_mib
from lora_lab.training.resolve import training_size

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = 0.15
IMAGES = ("stage.prompts=['A {trigger}']", "sampler.steps=2")
ROWS = {
    "fast": ("memory=fast", "batch_size=1"),
    "fast, batch 4": ("memory=fast", "batch_size=4"),
    "balanced": ("memory=balanced", "batch_size=1"),
    "balanced, batch 4": ("memory=balanced", "batch_size=4"),
    "balanced, rank 128": ("memory=balanced", "batch_size=1", "rank=128"),
    "low": ("memory=low", "batch_size=1"),
    "minimal": ("memory=minimal", "batch_size=1"),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return prepare(tmp_path_factory.mktemp("bench"), DRY)


@pytest.mark.parametrize("row", ROWS)
def test_a_run_takes_the_memory_that_its_plan_expects(row, bench, tmp_path):
    free()
    in_use = 0 if DRY else gpu_memory()()  # by this process, in which other tests may have run
    overrides = [*bench.overrides, *IMAGES, *ROWS[row]]
    config = compose(*overrides)
    expected = expected_mib(training_size(config, OptimizerTraits.split(config.optimizer)[0]))
    measured = measure(tmp_path / "run", overrides, steps=6, flops=1.0, peak=None)
    peak = None if DRY else measured.process_mib - in_use
    print("MEASURED", json.dumps({"row": row, "expected MiB": round(expected), "card MiB": peak}))
    assert DRY or abs(expected / peak - 1) <= TOLERANCE, f"{expected:.0f} MiB expected, {peak} MiB on the card"
