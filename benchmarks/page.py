"""What the first comparison page of many runs costs.

python -m benchmarks.page OUT [--runs 100] [--images 1000] [--size 128]

The run folders are written as a sweep leaves them, with crops of the bundled images as validation images, and the page
is made by `stage=compare` in a process of its own, which is timed by the clock and by the processor. A second time, all
thumbnails are there."""

import argparse
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from lora_lab.demo import TOFU
from tests.sweep_folders import write_sweep

SEEDS, STEPS = 10, 10


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.page", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000, help="of each run")
    parser.add_argument("--size", type=int, default=128, help="pixels, of a side")
    options = parser.parse_args()
    sweep = options.out / "sweep"
    if not sweep.is_dir():
        write_runs(sweep, options.runs, options.images, options.size)
    for name in ("first page", "again"):
        begin, used = time.perf_counter(), processor_seconds()
        command = [sys.executable, "-m", "lora_lab", "stage=compare", f"stage.folder={sweep}"]
        subprocess.run([*command, f"hydra.run.dir={options.out / 'page'}"], check=True)
        seconds = time.perf_counter() - begin
        print(f"{name}: {seconds:.0f} s by the clock, {processor_seconds() - used:.0f} s of {os.cpu_count()} cores")


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_runs(sweep: Path, runs: int, images: int, size: int) -> None:
    """A sweep of `runs` learning rates with `images` images of each, every one a crop of its own."""
    prompts = [f"A {{trigger}}, place {number}" for number in range(images // SEEDS // STEPS)]
    swept = {"lr": [f"{number}e-6" for number in range(1, runs + 1)]}
    folders = write_sweep(sweep, swept, prompts=prompts, seeds=tuple(range(SEEDS)), steps=tuple(range(1, STEPS)))
    sources = [Image.open(file).convert("RGB").resize((2 * size, 2 * size)) for file in sorted(TOFU.glob("*.png"))]
    choose = random.Random(0)
    for file in (file for folder in folders for file in sorted(folder.glob("samples/*/*.png"))):
        left, top = choose.randrange(size), choose.randrange(size)
        choose.choice(sources).crop((left, top, left + size, top + size)).save(file, compress_level=1)


if __name__ == "__main__":
    main()
