"""What a benchmark needs before its first row: a base, pictures, and the device's own rate."""

import shutil
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

from lora_lab import demo
from tests.sdxl_structure import Shape, pipeline

MATMUL = 8192  # side of the bf16 product whose rate counts as the device's peak


def random_base(folder: Path, shape: Shape) -> Path:
    """SDXL in float16 as a diffusers folder, made once."""
    if not (folder / "model_index.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        pipe = pipeline(shape, "cuda" if torch.cuda.is_available() else "cpu", torch.float16)
        pipe.save_pretrained(folder)
        del pipe
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return folder


def tofu(folder: Path, side: int) -> Path:
    """The demo's 24 pictures, side x side."""
    if not folder.is_dir():
        shutil.copytree(demo.TOFU, folder)
        for file in folder.glob("*.png"):
            Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(file)
    return folder


def matmul_rate() -> float:
    """The device's bf16 rate in TFLOP/s: median of 12 products of random matrices, by events."""
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(13)]
    for mark in marks:
        mark.record()
        a @ b
    torch.cuda.synchronize()
    times = sorted(x.elapsed_time(y) for x, y in pairwise(marks))
    torch.cuda.empty_cache()
    return 2 * MATMUL**3 / times[len(times) // 2] / 1e9
