"""The program at SDXL's real size (3.5 billion random weights, 1024 px) on one GPU, in a few minutes.

    python -m pytest tests/gpu -m gpu -n 0

Every test prints a line `MEASURED {json}`. LORA_LAB_GPU_DRY=1 runs the same lines on a CPU with narrow weights."""

import json
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from gpu_memory import DRY, free, peak_gib
from PIL import Image
from safetensors.torch import load_file
from sdxl_structure import FULL, NARROW, pipeline, save_single_file

from lora_lab import demo
from lora_lab.base.load import load_base
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.settings.schema import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE, SIDE, DEVICE = (NARROW, 128, "cpu") if DRY else (FULL, 1024, "cuda")
PROMPTS = "stage.prompts=['A {trigger} with a green background, smiling','A {trigger} wearing a red party hat']"


@dataclass(frozen=True)
class Place:
    base: Path  # a diffusers folder in float16, as the hub's variant is
    pictures: Path
    work: Path
    billion_parameters: float
    seconds: float  # to make it all


@dataclass(frozen=True)
class Run:
    folder: Path
    result: dict
    metrics: list[dict]

    @cached_property
    def lora(self) -> dict[str, torch.Tensor]:
        return load_file(self.result["lora"])

    def seconds_per_step(self) -> float:
        """The median of the second half: the first steps choose kernels and fill the allocator's cache."""
        times = [1 / line["images_per_second"] for line in self.metrics]
        return statistics.median(times[len(times) // 2 :])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    work = tmp_path_factory.mktemp("sdxl")
    began = time.perf_counter()
    pipe = pipeline(SHAPE, DEVICE, torch.float16)
    count = sum(p.numel() for part in parts_of(pipe).values() for p in part.parameters())
    pipe.save_pretrained(work / "base")
    del pipe
    free()
    pictures = work / "pictures"
    shutil.copytree(demo.HERE / "tofu", pictures)
    for file in pictures.glob("*.png"):
        Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file)
    before = Path.cwd()
    os.chdir(work)  # finished files go to models/lora beside where the user works
    yield Place(work / "base", pictures, work, round(count / 1e9, 3), since(began))
    os.chdir(before)
    shutil.rmtree(work, ignore_errors=True)  # 20 GB, of which pytest would keep three generations


@pytest.fixture(scope="module")
def trained(place) -> Run:
    return train(place, "trained", "steps=20", "stage.validate_every=10", "stage.checkpoint_every=10", "lr=3e-4")


@pytest.fixture
def measured(capsys):
    def write(test: str, **numbers: object) -> None:
        with capsys.disabled():
            print("\nMEASURED " + json.dumps({"test": test, **numbers}))

    return write


@pytest.fixture(autouse=True)
def clean_gpu():
    free()
    yield
    free()


def test_training_at_full_size_learns_and_its_pictures_are_pictures(trained, place, measured):
    measured("base", billion_parameters=place.billion_parameters, seconds=place.seconds)
    losses = [line["loss"] for line in trained.metrics]
    measured(
        "train, memory=balanced",
        seconds=trained.result["seconds"],
        seconds_per_step=round(trained.seconds_per_step(), 3),
        peak_gib_before_drawing=round(trained.metrics[8]["memory_mib"] / 1024, 2),
        peak_gib=round(max(line["memory_mib"] for line in trained.metrics) / 1024, 2),
        loss=[round(loss, 4) for loss in losses],
        grad_norm=round(statistics.median(line["grad_norm"] for line in trained.metrics), 5),
        picture_spread=[spread(file) for files in trained.result["samples"].values() for file in files],
    )
    assert [line["step"] for line in trained.metrics] == list(range(1, 21))
    assert np.isfinite(losses).all()
    assert all(np.isfinite(line["grad_norm"]) and line["grad_norm"] > 0 for line in trained.metrics)
    assert list(trained.result["samples"]) == ["10", "20"]
    for files in trained.result["samples"].values():
        assert len(files) == 2
        assert all(Image.open(file).size == (SIDE, SIDE) and spread(file) > 5 for file in files)
    ups = [value for key, value in trained.lora.items() if key.endswith("lora_up.weight")]
    assert len(ups) == 560
    assert all(up.isfinite().all() and up.abs().max() > 0 for up in ups)


def test_a_run_killed_after_its_checkpoint_goes_on_to_the_same_lora(trained, place, measured):
    killed = place.work / "killed"
    shutil.copytree(trained.folder, killed)
    shutil.rmtree(killed / "checkpoints" / "step-000020")
    shutil.rmtree(killed / "lora")
    (killed / "result.json").unlink()
    resumed = train(
        place, "killed", "steps=20", "stage.validate_every=10", "stage.checkpoint_every=10", "lr=3e-4",
        f"resume={killed}",
    )  # fmt: skip
    halfway = load_file(trained.folder / "lora" / "HANA_TOFU-000010.safetensors")
    apart, learnt = distance(resumed.lora, trained.lora), distance(halfway, trained.lora)
    measured(
        "resume", relative_distance=apart, of_which_learnt_since=learnt,
        exact=all(torch.equal(a, trained.lora[key]) for key, a in resumed.lora.items()),
        seconds_per_step=round(resumed.seconds_per_step(), 3),
    )  # fmt: skip
    assert [line["step"] for line in resumed.metrics] == list(range(1, 21))
    # On a GPU attention's backward pass adds up in no fixed order, and Adam turns the rounding into steps.
    assert apart < learnt / 5


def test_the_file_draws_the_validation_picture_in_plain_diffusers(trained, place, measured):
    pipe = StableDiffusionXLPipeline.from_pretrained(place.base, torch_dtype=torch.bfloat16, add_watermarker=False)
    pipe.to(DEVICE)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    shown = trained.result["samples"]["20"][0]
    prompt = Image.open(shown).text["prompt"]

    def draw() -> np.ndarray:
        picture = pipe(
            prompt, width=SIDE, height=SIDE, num_inference_steps=4, guidance_scale=5.0,
            generator=torch.Generator("cpu").manual_seed(0),
        ).images[0]  # fmt: skip
        return pixels(picture)

    without = draw()
    pipe.load_lora_weights(trained.result["lora"])
    began = time.perf_counter()
    again = draw()
    apart, effect = np.abs(again - pixels(shown)).mean().item(), np.abs(without - pixels(shown)).mean().item()
    measured("reload", mean_difference=round(apart, 4), without_the_lora=round(effect, 4), seconds=since(began))
    assert apart < effect / 10


def test_a_photo_becomes_a_picture_of_the_models_size(trained, place, measured):
    began = time.perf_counter()
    config = composed(
        place, "stage=img2img", f"lora={trained.folder}", "stage.photo=demo:photos/1.png",
        'stage.prompt="A {trigger} with a red hat"', "stage.strength=0.5",
    )  # fmt: skip
    result = run_stage(config, place.work / "img2img")
    picture = result.pictures[0].picture
    measured("img2img", seconds=since(began), peak_gib=peak_gib(), picture_spread=spread(picture))
    assert result.pictures[0].prompt == "A HANA_TOFU with a red hat"
    assert Image.open(picture).size == (SIDE, SIDE)
    assert spread(picture) > 5


def test_float16_trains_with_a_loss_scale_that_lets_steps_through(place, measured):
    half = train(place, "half", "steps=3", "model.precision=" + ("fp32" if DRY else "fp16"), "stage.validate_every=0")
    measured(
        "train, fp16", seconds=half.result["seconds"], seconds_per_step=round(half.seconds_per_step(), 3),
        loss=[round(line["loss"], 4) for line in half.metrics], grad_norm=[str(m["grad_norm"]) for m in half.metrics],
        picture_spread=[spread(file) for file in half.result["samples"]["3"]],
    )  # fmt: skip
    assert all(np.isfinite(line["loss"]) for line in half.metrics)
    assert any(value.abs().max() > 0 for key, value in half.lora.items() if key.endswith("lora_up.weight"))
    assert all(value.isfinite().all() for value in half.lora.values())
    assert all(spread(file) > 5 for file in half.result["samples"]["3"])


def test_memory_fast_keeps_the_activations(place, trained, measured):
    fast = train(place, "fast", "steps=10", "memory=fast", "batch_size=1", "stage.validate_every=0")
    mebibytes = [max(line["memory_mib"] for line in r.metrics) for r in (fast, trained)]
    measured(
        "train, memory=fast, batch 1", seconds=fast.result["seconds"],
        seconds_per_step=round(fast.seconds_per_step(), 3), balanced=round(trained.seconds_per_step(), 3),
        peak_gib=round(mebibytes[0] / 1024, 2), peak_gib_balanced=round(mebibytes[1] / 1024, 2),
    )  # fmt: skip
    assert all(np.isfinite(line["loss"]) for line in fast.metrics)
    if not DRY:
        assert mebibytes[0] > mebibytes[1]  # that they are kept; what it saves is for benchmarks


def test_a_single_checkpoint_file_is_the_same_base(place, measured):
    config = composed(place, "stage=train").model
    device = torch.device(DEVICE)
    pipe = load_base(config, device).pipe
    expected = {name: {k: v.cpu() for k, v in part.state_dict().items()} for name, part in parts_of(pipe).items()}
    single = save_single_file(pipe, place.work / "single.safetensors")
    gib = single.stat().st_size / 2**30
    del pipe
    free()
    config.base, config.config = str(single), str(place.base)
    began = time.perf_counter()
    loaded = load_base(config, device).pipe
    measured("single file", gib=round(gib, 2), seconds=since(began))
    for name, part in parts_of(loaded).items():
        state = part.state_dict()
        assert state.keys() == expected[name].keys()
        assert all(torch.equal(value.cpu(), expected[name][key]) for key, value in state.items()), name
    single.unlink()


def composed(place: Place, *overrides: str) -> Config:
    common = ["experiment=sdxl", f"model.base={place.base}", "model.vae=null", "model.variant=null"]
    common += ["model.judge=null", "tracker=off"]
    dry = ["model.resolution=128", "device=cpu", "model.precision=bf16"] if DRY else []
    return compose(*common, f"dataset.root={place.pictures}", "sampler.steps=4", *dry, *overrides)


def train(place: Place, name: str, *overrides: str) -> Run:
    free()
    folder = place.work / name
    run_stage(composed(place, "stage=train", PROMPTS, *overrides), folder)
    result = json.loads((folder / "result.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(folder, result, metrics)


def parts_of(pipe: StableDiffusionXLPipeline) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}


def since(began: float) -> float:
    return round(time.perf_counter() - began, 1)


def pixels(picture: Image.Image | str) -> np.ndarray:
    opened = Image.open(picture) if isinstance(picture, str) else picture
    return np.asarray(opened.convert("RGB"), dtype=np.float64)


def spread(file: str) -> float:
    """Standard deviation of the pixels: a black, grey or not-a-number picture has none."""
    return round(pixels(file).std().item(), 1)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Of two LoRAs, by their up matrices, which start at zero: |ours - theirs| / |theirs|."""
    keys = [key for key in theirs if key.endswith("lora_up.weight")]
    a, b = (torch.cat([lora[key].float().flatten() for key in keys]) for lora in (ours, theirs))
    return round(((a - b).norm() / b.norm()).item(), 5)
