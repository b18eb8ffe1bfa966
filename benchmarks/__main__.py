"""What training costs at SDXL's size, preset by preset: one row a run of the program itself, as JSON and as Markdown.

python -m benchmarks OUT [--memory fast balanced] [--batch 1 4] [--steps 30] [--kernels] [--dry]
    [--also memory.capture=false ...]

The base has SDXL's published sizes and random weights, since speed and memory do not depend on the values; OUT keeps it
for the next time. A row is a whole run with data, logging and checkpoint, in a process of its own, without pictures.
--dry goes the same way on a CPU with weights a few numbers wide. Run it in a checkout."""

import argparse
import json
import platform
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.prepare import matmul_rate, random_base, tofu
from benchmarks.row import Row, kernels, measure
from benchmarks.work import training_flops
from tests.sdxl_structure import FULL, NARROW

PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for base, pictures, runs and the table")
    parser.add_argument("--memory", nargs="+", default=["balanced", "fast"], help="options of memory=")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--also", nargs="*", default=[], help="further overrides of every run")
    parser.add_argument("--kernels", action="store_true", help="a second run for each row counts the GPU's own time")
    parser.add_argument("--dry", action="store_true", help="a few numbers wide, on a CPU")
    asked = parser.parse_args()
    if not asked.dry and not torch.cuda.is_available():
        parser.error("SDXL's size needs a CUDA GPU; --dry shows the way through on a CPU")
    out = asked.out.resolve()
    shape, side = (NARROW, 128) if asked.dry else (FULL, 1024)
    # In a process that ends: what it holds on the GPU would be counted as the runs'.
    with get_context("spawn").Pool(1) as elsewhere:
        base = elsewhere.apply(random_base, (out / "base", shape))
        peak = None if asked.dry else elsewhere.apply(matmul_rate)
        device = None if asked.dry else elsewhere.apply(torch.cuda.get_device_name)
    pictures = tofu(out / "pictures", side)
    flops = training_flops(shape, side)
    rows = []
    for memory in asked.memory:
        for batch in asked.batch:
            overrides = [
                "stage=train", "experiment=sdxl", f"model.base={base}", "model.vae=null", f"dataset.root={pictures}",
                f"model.resolution={side}", f"memory={memory}", f"batch_size={batch}", "tracker=off",
                "sampler.steps=1", "stage.prompts=['A {trigger}']", "model.judge=null", f"cache={out / 'cache'}",
                *asked.also,
            ]  # fmt: skip
            folder = out / "runs" / f"{memory}-{batch}"
            rows.append(measure(folder, overrides, asked.steps, flops * batch, peak))
            if asked.kernels:
                rows[-1] = replace(rows[-1], kernels=kernels(folder.with_name(f"{folder.name}-kernels"), overrides))
            report(out, rows, device, peak, asked)
    return 0


def report(out: Path, rows: list[Row], device: str | None, peak: float | None, asked: argparse.Namespace) -> None:
    """out/table.json and out/table.md, after every row."""
    machine = {
        "device": device or platform.processor() or "CPU",
        "bf16 TFLOP/s": peak and round(peak, 1),
        **{name: version(name) for name in PACKAGES},
    }
    table = {"command": " ".join(sys.argv[1:]), "machine": machine, "rows": [vars(row) for row in rows]}
    (out / "table.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), "", *markdown(rows)]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(markdown(rows)), flush=True)


HEAD = (
    "run", "step ms, median (least to most)", "of it kernels", "images/s", "TFLOP/s", "MFU", "allocated MiB",
    "process MiB in training", "in the whole run", "to the first step",
)  # fmt: skip


def markdown(rows: list[Row]) -> list[str]:
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for row in rows:
        share = "" if row.mfu is None else f"{row.mfu:.0%}"
        cells = [
            row.name, f"{row.median_ms:.1f} ({row.least_ms:.1f} to {row.most_ms:.1f}), {row.steps}",
            f"{row.kernels['kernel_ms']:.1f} in {row.kernels['kernels']}" if row.kernels else "",
            f"{row.images_per_second:.2f}", f"{row.tflops:.0f}", share, f"{row.allocated_mib:.0f}",
            row.training_mib or "", row.process_mib or "", f"{row.seconds_to_first_step:.1f} s",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run is stopped too
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:  # a run failed: its own words say why
        sys.exit(f"{error.output}\n{error}")
