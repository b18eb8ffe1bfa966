"""What a benchmark needs before its first row: a base, images, and a description of the machine."""

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image

from lora_lab import demo
from tests.sdxl_structure import FULL, NARROW, Shape, pipeline

PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")
MATMUL = 8192  # side of the bf16 product whose rate counts as the device's peak


@dataclass(frozen=True)
class Bench:
    overrides: list[str]  # of every run: SDXL's base and recipe
    shape: Shape
    side: int  # px
    machine: dict  # name of the device, its rate, and versions of the packages
    peak: float | None  # the device's TFLOP/s in bf16; None on a CPU


def prepare(out: Path, dry: bool) -> Bench:
    """SDXL's size on a GPU; with `dry` narrow weights on a CPU. Base, images and cache are kept in `out`."""
    shape, side = (NARROW, 128) if dry else (FULL, 1024)
    # In another process, which ends: its memory on the GPU would be counted as that of the runs.
    with get_context("spawn").Pool(1) as process:
        base = process.apply(random_base, (out / "base", shape))
        peak = None if dry else process.apply(matmul_rate)
        device = None if dry else process.apply(torch.cuda.get_device_name)
    overrides = [
        "stage=train", "experiment=sdxl", f"model.base={base}", "model.vae=null", "model.judge=null", "tracker=off",
        f"dataset.root={resized_demo(out / 'pictures', side)}", f"model.resolution={side}", f"cache={out / 'cache'}",
    ]  # fmt: skip
    machine = {
        "device": device or platform.processor() or "CPU",
        "bf16 TFLOP/s": peak and round(peak, 1),
        **{name: version(name) for name in PACKAGES},
    }
    return Bench(overrides, shape, side, machine, peak)


def random_base(folder: Path, shape: Shape) -> Path:
    """SDXL in float16 with random weights as a diffusers folder; made if it is missing."""
    if not (folder / "model_index.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        pipe = pipeline(shape, "cuda" if torch.cuda.is_available() else "cpu", torch.float16)
        pipe.save_pretrained(folder)
        del pipe
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return folder


def resized_demo(folder: Path, side: int) -> Path:
    """The demo's 24 images, resized to side x side pixels."""
    if not folder.is_dir():
        shutil.copytree(demo.TOFU, folder)
        for file in folder.glob("*.png"):
            Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(file)
    return folder


def matmul_rate() -> float:
    """The device's bf16 rate in TFLOP/s: the median of 12 products of random matrices, timed by CUDA events."""
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    events = [torch.cuda.Event(enable_timing=True) for _ in range(13)]
    for event in events:
        event.record()
        a @ b
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in pairwise(events))
    torch.cuda.empty_cache()
    return 2 * MATMUL**3 / times[len(times) // 2] / 1e9
