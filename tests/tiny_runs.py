"""Short runs on the bundled tiny base and six of its pictures, and what they leave, for tests of stage=train."""

import json
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from lora_lab.base.encode import Cache, Encoder
from lora_lab.base.load import load_base
from lora_lab.base.sdxl import SDXL
from lora_lab.errors import InputError, RunError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.training.data import TrainingData, encode_dataset
from lora_lab.training.metrics import MetricsFile
from lora_lab.training.resolve import ResolvedTraining, resolve_training

FAST = (
    "stage=train", "dataset=folder", "dataset.root=../tofu", "refiner=off", "device=cpu", "tracker=off",
    "model.judge=null", "rank=4", "batch_size=2", "sampler.steps=2", "stage.save_dtype=fp32", "cache=../cache",
    "stage.prompts=['A {trigger} with a green background']",
)  # fmt: skip
NOISE = "loss.noise_offset=0.1 loss.pyramid_iterations=6 loss.timestep_sampling=logit_normal loss=huber"
MEASURED = ("stage.validation_loss_every=1", "stage.validation_timesteps=[300,600,900]")


@contextmanager
def inside(root: Path, pictures: Path) -> Iterator[Path]:
    """Within the context the working folder is a new one in `root`, beside `pictures` as `tofu` and a `cache` that all
    such folders share."""
    before, folder, cache = Path.cwd(), root / "work", pictures.parent / "cache"
    (root / "tofu").symlink_to(pictures)
    cache.mkdir(exist_ok=True)
    (root / "cache").symlink_to(cache)
    folder.mkdir()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def train(folder: str, *overrides: str):
    with names_relative_to_here(overrides):
        return run_stage(compose(*FAST, *overrides), Path(folder).absolute())


@contextmanager
def names_relative_to_here(typed: Sequence[str]) -> Iterator[None]:
    """Within the context no line and no error names what lies in the working folder by its absolute path, but for words
    that were typed so."""
    lines, handler, log = [], logging.Handler(), logging.getLogger("lora_lab")
    handler.emit = lambda record: lines.append(record.getMessage())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except (InputError, RunError, KeyboardInterrupt) as error:
        lines.append(str(error))
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        for word in typed:
            lines = [line.replace(word, "") for line in lines]
        assert not [line for line in lines if f"{Path.cwd()}/" in line]


def lora(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/lora/HANA_TOFU.safetensors")


def checkpointed(checkpoint: Path | str) -> dict[str, torch.Tensor]:
    """What had been learnt, by part and name."""
    return load_file(f"{checkpoint}/learnt.safetensors")


def without_checksums(checkpoint: Path) -> dict:
    """The record of a checkpoint as a version that knew no checksums would have written it; it is written so."""
    record = json.loads((checkpoint / "training.json").read_text())
    del record["sha256"]
    (checkpoint / "training.json").write_text(json.dumps(record))
    return record


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def metrics(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def interrupt_at(step: int, monkeypatch) -> None:
    """Ctrl-C, once, while `step` is done."""
    write, sent = MetricsFile.write, []

    def and_interrupt(self, number, numbers):
        write(self, number, numbers)
        if number == step and not sent:
            sent.append(number)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsFile, "write", and_interrupt)


def resolved(*overrides: str) -> ResolvedTraining:
    return resolve_training(compose(*FAST, *overrides), Path("none").absolute())


def encoded(*overrides: str) -> tuple[ResolvedTraining, TrainingData, SDXL]:
    """The training that `overrides` describe, its data, and the base that encoded them."""
    training = resolved(*overrides)
    base = load_base(training.model, training.device)
    encoder = Encoder(base, training.device, Cache(None), False)
    files, crops = training.files, training.images.crops
    return training, encode_dataset(files.samples, crops, files.texts, training.dataset.flip, encoder), base


def cut_out(folder: Path, box: tuple[int, int, int, int]) -> Path:
    """Masks of the six pictures, white in `box`."""
    folder.mkdir()
    for i in range(6):
        mask = Image.new("L", (128, 128))
        mask.paste(255, box)
        mask.save(folder / f"{i:02d}.png")
    return folder


def validation(folder: str | Path) -> dict[int, float]:
    lines = [json.loads(line) for line in Path(folder, "validation.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["step"] for line in lines})
    return {line["step"]: line["loss"] for line in lines}


def reworded(root: Path, old: str, new: str, count: int = 1) -> None:
    file = root / "metadata.jsonl"
    file.write_text(file.read_text().replace(old, new, count))
