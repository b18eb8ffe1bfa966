"""What trainings of one dataset share: encoded data, and no image that is encoded."""

import gc
from collections.abc import Iterator
from types import FunctionType, ModuleType

import pytest
from PIL import Image
from tiny_runs import FAST

from lora_lab.demo import TOFU
from lora_lab.launch.config import compose
from lora_lab.training.base_context import prepare_base
from lora_lab.training.resolve import resolve_training

DATA = (
    "cache=null", "dataset.flip=true", "loss.mask=alpha", "prior=pictures", "prior.prompt='A tofu'",
    "stage.validation_loss_every=1",
)  # fmt: skip


def reachable(*roots: object) -> Iterator[object]:
    """Every object that `roots` keep alive, apart from code."""
    seen, remaining = set(), list(roots)
    while remaining:
        held = remaining.pop()
        if id(held) in seen or isinstance(held, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(held))
        yield held
        remaining += gc.get_referents(held)


@pytest.mark.parametrize(
    "judge", ["model.judge=null", pytest.param("model.judge=demo:tiny-clip", marks=pytest.mark.slow)]
)
def test_no_image_stays_in_memory_once_it_is_encoded(judge, tmp_path):
    folders = {name: tmp_path / name for name in ("training", "held_out", "class")}
    for number, folder in enumerate(folders.values()):
        folder.mkdir()
        for i in (2 * number, 2 * number + 1):
            Image.open(TOFU / f"{i:02d}.png").convert("RGBA").save(folder / f"{i:02d}.png")
            (folder / f"{i:02d}.txt").write_text("A HANA_TOFU" if number < 2 else "A tofu")
    roots = (f"dataset.root={folders['training']}", f"stage.validation_root={folders['held_out']}",
             f"prior.root={folders['class']}", f"score.held_out={folders['held_out']}")  # fmt: skip
    resolved = resolve_training(compose(*FAST, *DATA, *roots, judge), tmp_path / "run")

    def images(*roots: object) -> int:
        return sum(isinstance(held, Image.Image) for held in reachable(*roots))

    assert images(resolved) >= 8, "two of each, and masks of the first two"
    context = prepare_base(resolved)
    assert images(resolved, context) == 0
    assert [len(data.examples) for data in (context.data, context.validation_data, context.prior.data)] == [2, 2, 2]
