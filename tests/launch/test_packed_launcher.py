"""hydra/launcher=packed: every job writes what it writes when it is trained alone."""

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import interrupt_at

from lora_lab.demo import TOFU
from lora_lab.launch.config import compose
from lora_lab.launch.grouping import alone, groups, snapshot_groups
from lora_lab.settings.schema import Config
from lora_lab.training import pack as pack_runner
from lora_lab.training.lora_training import LoRATraining
from lora_lab.training.pack import PackedStep

SWEEP = (
    "-m", "stage=train", "dataset=folder", "dataset.root=six", "refiner=off", "tracker=off", "model.judge=null",
    "batch_size=2", "sampler.steps=2", "stage.prompts=['A {trigger}']", "stage.save_dtype=fp32", "rank=2",
    "stage.validation_loss_every=2", "stage.validation_timesteps=[500]", "device=cpu", "stage.validate_every=0",
)  # fmt: skip


@pytest.fixture
def run(exit_code_of):
    """Run a command line in a folder with six images."""
    pictures = Path("six")
    pictures.mkdir()
    for i in range(6):
        (pictures / f"{i:02d}.png").write_bytes((TOFU / f"{i:02d}.png").read_bytes())
        (pictures / f"{i:02d}.txt").write_text(f"A HANA_TOFU number {i}")
    return exit_code_of


def lora(job: Path) -> torch.Tensor:
    state = load_file(job / "lora" / "HANA_TOFU.safetensors")
    return torch.cat([value.flatten() for key, value in sorted(state.items())])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def files(job: Path) -> set[str]:
    return {path.relative_to(job).as_posix() for path in job.rglob("*") if path.is_file()}


def assert_same(packed: Path, alone: Path) -> None:
    assert files(packed) == files(alone)
    for name in ("metrics.jsonl", "validation.jsonl"):
        one, other = lines(packed / name), lines(alone / name)
        assert [line["step"] for line in one] == [line["step"] for line in other]
        assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in other], rel=1e-4)
    assert (lora(packed) - lora(alone)).norm() < 1e-4 * lora(alone).norm()
    one, other = (json.loads((job / "result.json").read_text()) for job in (packed, alone))
    assert one.keys() == other.keys() and one["steps"] == other["steps"]


@pytest.mark.slow
def test_every_job_of_a_pack_writes_what_it_writes_alone(run, capsys):
    points = ("rank=2,5", "lr=1e-3,3e-3", "steps=3,6", "stage.checkpoint_every=3")
    assert run(*SWEEP, *points, "hydra/launcher=packed", "hydra.sweep.dir=packed") == 0
    assert "8 jobs on one base" in capsys.readouterr().out
    assert run(*SWEEP, *points, "hydra.sweep.dir=basic") == 0
    for number in range(8):
        assert_same(Path(f"packed/{number}"), Path(f"basic/{number}"))
    assert (Path("packed") / "index.html").is_file() and not Path("models").exists()


@pytest.mark.slow
def test_a_failed_job_of_a_packed_sweep_leaves_the_others_running(run, capsys):
    how = ("steps=2", "stage.validation_loss_every=0", "hydra/launcher=packed", "hydra.sweep.dir=packed")
    assert run(*SWEEP, "lr=1e-3,1e20", *how) == 1
    assert "lower lr" in json.loads(Path("packed/1/failed.json").read_text())["error"]
    assert Path("packed/0/result.json").is_file() and not Path("packed/1/result.json").exists()
    output = capsys.readouterr()
    assert "2 jobs on one base" in output.out and "compare the runs: packed/index.html" in output.out
    assert "lr=1e+20" in output.err and "lower lr" in output.err


@pytest.mark.slow
def test_a_failed_job_does_not_change_what_the_others_learn(run):
    packed = ("hydra/launcher=packed", "hydra.sweep.dir=packed", "steps=4")
    assert run(*SWEEP, "lr=1e-3,1e20,3e-3", *packed) == 1
    assert run(*SWEEP[1:], "lr=3e-3", "steps=4", "publish=false", "hydra.run.dir=alone") == 0
    assert (lora(Path("packed/2")) - lora(Path("alone"))).norm() < 1e-4 * lora(Path("alone")).norm()


@pytest.mark.slow
def test_a_stopped_pack_resumes_without_repeating_finished_jobs(run, monkeypatch, capsys):
    points = ("lr=1e-3,3e-3", "steps=2,6", "schedule=cosine", "hydra/launcher=packed")
    with monkeypatch.context() as once:
        interrupt_at(4, once)
        assert run(*SWEEP, *points, "hydra.sweep.dir=cut") == 1
    assert "resume with: python -m lora_lab resume=cut" in capsys.readouterr().err
    done = {job: (Path("cut") / job / "result.json").stat().st_mtime_ns for job in "02"}
    assert not list(Path("cut").glob("[13]/result.json"))
    assert [path.name for path in Path("cut").glob("[13]/checkpoints/*")] == 2 * ["step-000004"]
    assert run("resume=cut") == 0
    assert done == {job: (Path("cut") / job / "result.json").stat().st_mtime_ns for job in "02"}
    assert run(*SWEEP, *points, "hydra.sweep.dir=whole") == 0
    for number in range(4):
        assert lines(Path(f"cut/{number}/metrics.jsonl"))[-1]["step"] == (2, 6)[number % 2]
        cut, whole = (lora(Path(sweep, str(number))) for sweep in ("cut", "whole"))
        assert (cut - whole).norm() < 1e-6 * whole.norm()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("adapter=dora", "no LoRA"), ("adapter=lokr", "no LoRA"), ("adapter=pissa", "PiSSA"),
        ("adapter.lora_dropout=0.1", "dropout"), ("targets=all", "linear layers"), ("text=lora", "text"),
        ("prior=prediction", "prior"), ("stage.start_from=x", "file"), ("stage=check", "stage=train"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_be_packed_has_a_reason(how, why):
    assert why in alone(compose("stage=train", *how.split()))


def test_jobs_are_packed_if_they_differ_only_in_keys_of_a_job():
    points = ["rank=4", "lr=1e-5 rank=8", "optimizer=adamw8bit", "schedule=cosine", "seed=3", "steps=7",
              "batch_size=2", "loss=huber", "targets=ff", "adapter=dora", "name=other tracker=off", "adapter=rslora",
              "trigger=X", "text.max_tokens=150"]  # fmt: skip
    configs = [compose("stage=train", *point.split()) for point in points]
    assert shared(configs) == [[0, 1, 2, 3, 4, 5, 10, 11], [6], [7], [8], [9], [12], [13]]
    assert shared(configs[:5], most=3) == [[0, 1], [2, 3, 4]]


def shared(configs: list[Config], most: int | None = None, workers: int = 1) -> list[list[int]]:
    return [group.jobs for group in groups(configs, most, workers)]


@pytest.fixture(scope="module")
def plain() -> Config:
    return compose("stage=train", "steps=10")


def test_groups_give_every_worker_an_equal_share_of_the_steps(plain):
    rates = [replace(plain, lr=lr) for lr in range(1, 9)]
    others = [replace(config, batch_size=2) for config in rates]
    assert shared(rates, workers=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shared(rates[:3], workers=4) == [[0], [1], [2]]
    assert shared(rates, most=2, workers=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shared([*rates, *others], workers=2) == [list(range(8)), list(range(8, 16))], "no more parts than must be"
    assert shared([*rates, *others[:4]], workers=2) == [[0, 1, 2, 3, 4, 5], [8, 9, 10, 11], [6, 7]]
    long = [replace(rates[0], steps=60), *(replace(config, steps=20) for config in rates[1:4])]
    assert shared(long, workers=2) == [[0], [1, 2, 3]], "steps are what takes time"


def test_a_job_that_is_the_start_of_a_longer_one_stays_in_its_group(plain):
    configs = [replace(plain, lr=lr, steps=steps) for steps in (5, 10) for lr in (1, 2)]
    assert shared(configs, workers=2) == [[0, 2], [1, 3]]
    assert shared(configs, most=2) == [[0, 1, 2, 3]]


def test_only_a_job_that_cannot_be_packed_has_a_reason_to_train_alone(plain):
    dora = replace(plain, adapter=plain.adapter | {"use_dora": True})
    configs = [plain, replace(plain, lr=2), dora, replace(plain, batch_size=2)]
    assert [group.why for group in groups(configs, 1)] == [
        "", "", "its adapter is no LoRA", "no other job has its base, its data and its layers"
    ]  # fmt: skip


def snapshots(configs) -> list[list[int]]:
    return snapshot_groups(configs, range(len(configs)))


def test_shorter_jobs_are_snapshots_if_their_schedule_does_not_depend_on_the_steps():
    points = ["steps=5", "steps=10", "steps=10 lr=1", "steps=5 lr=1", "steps=5 schedule=cosine",
              "steps=10 schedule=cosine", "steps=3 rank=8", "steps=5 seed=1"]  # fmt: skip
    configs = [compose("stage=train", *point.split()) for point in points]
    assert snapshots(configs) == [[1, 0], [2, 3], [4], [5], [6], [7]]


def test_resumed_jobs_are_snapshots_if_they_stand_at_the_same_step(plain, tmp_path):
    configs = [replace(plain, steps=steps, resume=str(tmp_path / str(steps))) for steps in (5, 10, 20, 40)]
    for config, step in zip(configs[:3], (3, 3, 4), strict=True):
        checkpoint = Path(config.resume, "checkpoints", f"step-{step:06d}")
        checkpoint.mkdir(parents=True)
        (checkpoint / "training.json").touch()
    assert snapshots([*configs, replace(plain, steps=30)]) == [[1, 0], [2], [3, 4]]


@pytest.mark.slow
def test_with_images_of_several_sizes_each_seed_has_a_pack(run):
    from PIL import Image

    wide = Image.open("six/00.png").convert("RGB").resize((192, 96))
    for name in ("00", "01", "02"):
        wide.save(f"six/{name}.png")
    assert run(*SWEEP, "seed=0,1", "lr=1e-3,3e-3", "steps=4", "hydra/launcher=packed", "hydra.sweep.dir=packed") == 0
    alone = ("seed=1", "lr=3e-3", "steps=4", "publish=false", "hydra.run.dir=alone")
    assert run(*SWEEP[1:], *alone) == 0
    assert (lora(Path("packed/3")) - lora(Path("alone"))).norm() < 1e-4 * lora(Path("alone")).norm()


class SmallGPU:
    """A GPU whose memory runs out where `full(engine, LoRAs, steps done)`; `held` is what a failed pack left alive."""

    def __init__(self, full, monkeypatch):
        self.steps, self.held, self.failed = 0, [], []
        build = pack_runner.build_packed_step

        def build_limited(trainings, **options):
            self.held += [thing for thing in (ref() for ref in self.failed) if thing is not None]
            return Limited(build(trainings, **options), full, self)

        monkeypatch.setattr(pack_runner, "build_packed_step", build_limited)


@dataclass(frozen=True)
class Limited:
    """An engine on a SmallGPU."""

    engine: PackedStep
    full: Callable[[PackedStep, int, int], bool]
    gpu: SmallGPU

    def forward_backward(self, batches):
        if self.full(self.engine, len(batches), self.gpu.steps):
            flats = [training.params for training in self.engine.trainings]
            self.gpu.failed = [weakref.ref(self.engine), *map(weakref.ref, flats)]
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.gpu.steps += 1
        return self.engine.forward_backward(batches)

    def sync_weights(self):
        self.engine.sync_weights()


@pytest.mark.slow
def test_a_pack_that_is_out_of_memory_is_halved_and_resumes_from_its_checkpoints(run, monkeypatch, capsys):
    """Also where the memory ends in the update, when some jobs are ahead of others."""
    points, update = ("lr=1e-3,3e-3", "steps=2,4", "stage.keep_checkpoints=1"), LoRATraining.clip_and_update
    assert run(*SWEEP, *points, "hydra.sweep.dir=basic") == 0
    with monkeypatch.context() as once:
        gpu = SmallGPU(lambda engine, loras, steps: loras > 1 and steps == 1, once)
        assert run(*SWEEP, *points, "hydra/launcher=packed", "hydra.sweep.dir=later") == 0
    assert "out of GPU memory for 2 LoRAs at once: training goes on with at most 1 at a time" in capsys.readouterr().out
    assert not gpu.held
    updated = []

    def torn(training):
        updated.append(training)
        if len(updated) == 4:  # the second job's second
            raise torch.OutOfMemoryError("CUDA out of memory")
        return update(training)

    monkeypatch.setattr(LoRATraining, "clip_and_update", torn)
    assert run(*SWEEP, *points, "hydra/launcher=packed", "hydra.sweep.dir=torn") == 0
    for name, number in product(("later", "torn"), range(4)):
        assert_same(Path(f"{name}/{number}"), Path(f"basic/{number}"))


@pytest.mark.slow
def test_a_job_that_is_out_of_memory_alone_fails_and_the_others_finish(run, monkeypatch):
    gpu = SmallGPU(lambda engine, loras, steps: loras > 1 or engine.stack.params[0].shape[0] == 5, monkeypatch)
    assert run(*SWEEP, "rank=2,5", "steps=2", "hydra/launcher=packed", "hydra.sweep.dir=packed") == 1
    assert run(*SWEEP[1:], "steps=2", "publish=false", "hydra.run.dir=alone") == 0
    assert (lora(Path("packed/0")) - lora(Path("alone"))).norm() < 1e-4 * lora(Path("alone")).norm()
    said = json.loads(Path("packed/1/failed.json").read_text())["error"]
    assert said.startswith("out of GPU memory: use memory=balanced") and "resume" not in said
    assert not Path("packed/1/result.json").exists() and not gpu.held
