"""A captured step gives the results of an eager one.

python -m pytest tests/gpu/test_cuda_graph.py -m gpu -n 0"""

import json
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_lab.base.cuda_graph import WARM_UP_CALLS, GraphedCallable, GraphPool
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.training.lora_training import LoRATraining, Update

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_call_of_every_shape_counts_once():
    total = torch.zeros(3, device="cuda")

    def add(inputs):
        total.add_(inputs["x"].sum(0))
        return total.sum()

    captured = GraphedCallable(add, GraphPool(torch.device("cuda")))
    expected = torch.zeros(3)
    for i in range(3 * WARM_UP_CALLS):
        for rows in (1, 4):
            x = torch.full((rows, 3), float(i))
            expected += x.sum(0)
            assert captured({"x": x.cuda()}).item() == expected.sum()
    assert torch.equal(total.cpu(), expected)


def test_a_function_that_cannot_be_captured_runs_eagerly_and_is_reported_once(capsys):
    total = torch.zeros((), device="cuda")

    def waits(inputs):
        total.add_(inputs["x"].sum().item())  # a wait for the device
        return total

    captured = GraphedCallable(waits, GraphPool(torch.device("cuda")))
    for i in range(2 * WARM_UP_CALLS):
        assert captured({"x": torch.ones(2, device="cuda")}).item() == 2 * (i + 1)
    assert capsys.readouterr().out.count("can't be captured") == 1


def test_graphs_share_their_memory_and_any_of_them_may_end_first(capsys):
    def far(inputs):  # 256 MiB on the way to one number
        return (inputs["x"].expand(2**26) * 2 + 1).sum()

    def called(captured: GraphedCallable) -> None:
        for i in range(WARM_UP_CALLS + 2):
            assert captured({"x": torch.full((1,), float(i), device="cuda")}).item() == pytest.approx(
                2**26 * (2 * i + 1), rel=1e-4
            )

    def reserved() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved() >> 20

    before = reserved()
    pool = GraphPool(torch.device("cuda"))
    waiting, first = GraphedCallable(far, pool), GraphedCallable(far, pool)
    called(first)
    one = reserved() - before
    second = GraphedCallable(far, pool)
    called(second)
    assert one >= 256 and reserved() - before - one < 0.2 * one
    left = first({"x": torch.ones(1, device="cuda")})
    del first, second
    called(waiting)  # the pool has no graph any more, and still the memory of the result
    assert left.item() == pytest.approx(2**26 * 3, rel=1e-4)
    assert "can't be captured" not in capsys.readouterr().out


def train(folder: str, *overrides: str) -> dict[str, torch.Tensor]:
    config = compose(
        "stage=train", "tracker=off", "model.judge=null", "steps=40", "sampler.steps=2", "stage.save_dtype=fp32",
        "stage.prompts=['A {trigger}']", "stage.validate_every=15", *overrides,
    )  # fmt: skip
    run_stage(config, Path(folder).absolute())
    return load_file(f"{folder}/lora/HANA_TOFU.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    apart = torch.cat([(one[key] - other[key]).flatten() for key in one])
    return (apart.norm() / torch.cat([value.flatten() for value in other.values()]).norm()).item()


@pytest.mark.parametrize(
    "how",
    ["model.precision=fp32", "model.precision=bf16", "model.precision=fp16 optimizer=adamw8bit",
     "model.precision=bf16 prior=prediction", "model.precision=bf16 prior=prediction adapter=pissa",
     "model.precision=bf16 prior=generated prior.prompt=character prior.number=4",
     "model.precision=bf16 text=pivotal text.encoders=both",
     "model.precision=bf16 text=pivotal text.encoders=both prior=prediction"],
)  # fmt: skip
@pytest.mark.parametrize("memory", ["fast", "balanced"])
def test_captured_and_eager_training_give_the_same_lora(tmp_path, monkeypatch, how, memory):
    monkeypatch.chdir(tmp_path)
    how = [*how.split(), f"memory={memory}"]
    captured = train("captured", *how)
    eager, again = train("eager", "memory.capture=false", *how), train("again", "memory.capture=false", *how)
    # Two eager runs differ as well: attention's backward pass adds up in no fixed order.
    assert distance(captured, eager) < max(2 * distance(again, eager), 1e-3)
    speed = {name: seconds_per_step(name) for name in ("captured", "eager")}
    print("MEASURED " + json.dumps({"how": how, **speed}))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion8bit"])
def test_no_step_waits_for_the_device(tmp_path, monkeypatch, optimizer):
    monkeypatch.chdir(tmp_path)
    update, done = LoRATraining.clip_and_update, []

    def watched(training: LoRATraining) -> Update:
        done.append(update(training))
        # After the recording, and before the end, where everything is awaited.
        torch.cuda.set_sync_debug_mode("error" if 2 * WARM_UP_CALLS <= len(done) < 19 else "default")
        return done[-1]

    monkeypatch.setattr(LoRATraining, "clip_and_update", watched)
    try:
        train("run", "steps=20", "stage.validate_every=0", f"optimizer={optimizer}", "model.precision=bf16")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(done) == 20


def seconds_per_step(folder: str) -> float:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return statistics.median(4 / line["images_per_second"] for line in lines[20:])
