"""Numbers of steps are reported once each, in order."""

import torch

from lora_lab.training.metrics import AsyncMetrics


def test_on_a_cpu_a_step_is_reported_before_the_next_one():
    seen = []
    metrics = AsyncMetrics(4, torch.device("cpu"), lambda step, numbers: seen.append((step, numbers)))
    for step in (1, 2):
        metrics.start_step()
        metrics.push(step, {"loss": torch.tensor(float(step))}, torch.tensor(0.5), 1e-3)
        assert len(seen) == step
    metrics.flush()
    assert [step for step, _ in seen] == [1, 2]
    assert seen[1][1]["loss"] == 2 and seen[1][1]["grad_norm"] == 0.5 and seen[1][1]["lr"] == 1e-3
    assert seen[1][1]["images_per_second"] > 0 and seen[1][1]["memory_mib"] > 0
