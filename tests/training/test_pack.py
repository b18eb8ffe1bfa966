"""Several LoRAs in one step are each what it would be alone."""

import shutil

import pytest
import torch
from tiny_runs import FAST, encoded

from lora_lab.base.layers import quantize_
from lora_lab.demo import TOFU
from lora_lab.launch.config import compose
from lora_lab.training.base_context import BaseContext
from lora_lab.training.engine import build_single_step
from lora_lab.training.lora_training import LoRATraining
from lora_lab.training.loss import objective
from lora_lab.training.pack import build_packed_step, clone_sharing_weights
from lora_lab.training.resolve import resolve_training
from lora_lab.training.trainer import build_training

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


def weights_after_training(trainings, data, engine) -> list[torch.Tensor]:
    """The master weights (N,) of each training after some steps by `engine`."""
    context = BaseContext(None, data, None, data, None, None)
    for step in range(STEPS):
        engine.forward_backward([context.batches(training, step) for training in trainings])
        for training in trainings:
            training.clip_and_update()
        engine.sync_weights()
    return [training.params.master.detach().clone() for training in trainings]


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(its, id=name, marks=() if name == "rank and lr" else pytest.mark.slow)
        for name, its in POINTS.items()
    ],
)
@pytest.mark.slow
def test_a_lora_in_a_pack_is_the_lora_alone(points, prepared, tmp_path):
    root, _, data, base = prepared
    resolved = [resolve_training(compose(*FAST, root, *COMMON, *point.split()), tmp_path) for point in points]
    memory = resolved[0].memory
    network = clone_sharing_weights(base.network)
    quantize_(network, memory.linear_weights, memory.convolution_weights, torch.device("cpu"))
    loss_objective = objective(resolved[0].loss, base)

    def build() -> list[LoRATraining]:
        return [build_training(clone_sharing_weights(network), loss_objective, one) for one in resolved]

    initial = [training.params.master.detach().clone() for training in build()]
    alone = []
    for training in build():
        engine = build_single_step(training, memory, "off", None, base_is_prior=False)
        alone += weights_after_training([training], data, engine)
    trainings = build()
    packed = weights_after_training(trainings, data, build_packed_step(trainings, memory, "off", None))
    for one, other, start in zip(packed, alone, initial, strict=True):
        assert (one - other).norm() < 1e-3 * (other - start).norm()


def test_trainings_of_a_pack_read_their_images_once(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "00.png").write_bytes((TOFU / "00.png").read_bytes())
    (images / "00.txt").write_text("A HANA_TOFU")
    small, large = (compose(*FAST, f"dataset.root={images}", f"rank={rank}") for rank in (2, 4))
    first = resolve_training(small, tmp_path / "0")
    shutil.rmtree(images)
    second = resolve_training(large, tmp_path / "1", first)
    assert second.adapter.r == 4 and second.fingerprint != first.fingerprint
    assert second.files == first.files and second.images is first.images
