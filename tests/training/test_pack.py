"""Several LoRAs in one step are each what it would be alone."""

import shutil

import pytest
import torch
from tiny_runs import FAST, encoded

from lora_lab.base.quantize import quantize_
from lora_lab.demo import TOFU
from lora_lab.launch.config import compose
from lora_lab.training.build import build_training
from lora_lab.training.loss import objective
from lora_lab.training.pack import Pack, clone_sharing_weights
from lora_lab.training.plan import make_plan

STEPS = 4
POINTS = {
    "rank and lr": ["rank=4", "rank=16 lr=3e-3"],
    "scale": ["rank=4 adapter.lora_alpha=8", "rank=4 adapter.lora_alpha=1", "rank=2"],
    "rslora": ["adapter=rslora rank=9", "adapter=rslora rank=4"],
    "optimizer": ["optimizer=adamw8bit rank=16", "optimizer=prodigy rank=4", "optimizer=adafactor rank=2"],
    "update": ["stage.max_grad_norm=1e-4", "schedule=cosine", "stage.ema_decay=0.9", "stage.lora_plus_ratio=4"],
    "seed": ["seed=0", "seed=1"],
    "ff": ["targets=ff rank=2", "targets=ff rank=3"],
    "low": ["memory=low rank=2", "memory=low rank=4"],
}
COMMON = ("cache=null", "dataset.flip=true", "stage.gradient_accumulation=2")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Data and base, of six pictures."""
    folder = tmp_path_factory.mktemp("six")
    for i in range(6):
        (folder / f"{i:02d}.png").write_bytes((TOFU / f"{i:02d}.png").read_bytes())
        (folder / f"{i:02d}.txt").write_text(f"A HANA_TOFU number {i}")
    root = f"dataset.root={folder}"
    return (root, *encoded(root, *COMMON))


def trained(jobs, data, backward, publish=lambda: None) -> list[torch.Tensor]:
    """What `jobs` have learnt after some steps; `backward` is of a batch of each."""
    parts = jobs[0].settings.gradient_accumulation
    for step in range(STEPS):
        for part in range(parts):
            which = {"step": step, "part": part, "parts": parts, "caption_dropout": 0.0}
            backward([data.batch(seed=j.seed, batch_size=j.batch_size, objective=j.asked, **which) for j in jobs])
        for job in jobs:
            job.update()
        publish()
    return [job.learnt.master.detach().clone() for job in jobs]


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(its, id=name, marks=() if name == "rank and lr" else pytest.mark.slow)
        for name, its in POINTS.items()
    ],
)
def test_a_lora_in_a_pack_is_the_lora_alone(points, prepared, tmp_path):
    root, _, data, base = prepared
    configs = [compose(*FAST, root, *COMMON, *point.split()) for point in points]
    unet = clone_sharing_weights(base.network)
    quantize_(unet, configs[0].memory.linear_weights, configs[0].memory.convolution_weights, torch.device("cpu"))
    asked = objective(configs[0].loss, base)

    def started(alone: bool):
        return [
            build_training(clone_sharing_weights(unet), asked, c, make_plan(c, tmp_path), alone=alone) for c in configs
        ]

    alone = []
    for job in started(alone=True):
        job.unet.train()
        alone += trained([job], data, lambda batches, job=job: job.backward(batches[0]))
    jobs = started(alone=False)
    pack = Pack(jobs, configs[0].memory, "off", None)
    packed = trained(jobs, data, pack.backward, pack.publish)
    began = [job.learnt.master.detach() for job in started(alone=False)]
    for one, other, first in zip(packed, alone, began, strict=True):
        assert (one - other).norm() < 1e-3 * (other - first).norm()


def test_jobs_of_a_pack_read_their_pictures_once(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "00.png").write_bytes((TOFU / "00.png").read_bytes())
    (pictures / "00.txt").write_text("A HANA_TOFU")
    first, second = (compose(*FAST, f"dataset.root={pictures}", f"rank={rank}") for rank in (2, 4))
    plan = make_plan(first, tmp_path / "0")
    shutil.rmtree(pictures)
    other = make_plan(second, tmp_path / "1", plan)
    assert other.adapter.r == 4 and other.recipe != plan.recipe
    assert (other.samples, other.pictures, other.texts, other.hashes) == (
        plan.samples, plan.pictures, plan.texts, plan.hashes
    )  # fmt: skip
