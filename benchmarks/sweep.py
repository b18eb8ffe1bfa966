"""What a sweep of LoRAs costs at SDXL's size, packed and job by job, and whether both train the same LoRAs.

python -m benchmarks.sweep OUT [--points rank=4,8,16,32 lr=1e-4,5e-5] [--steps 500] [--launchers packed basic] [--dry]
    [--memory fast] [--also compile=blocks ...]

The base and the images are those of `python -m benchmarks`. A row is one command, timed from its start to its end: all
jobs with data, logging, checkpoint and LoRA file, without validation images. A second row also has the difference of
its jobs from the first's: data and noise are the same, so the losses of every step can be compared."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.command import make_parser, parse, run_main
from benchmarks.prepare import prepare
from benchmarks.row import METRICS, read_lines, watched
from benchmarks.table import write_table

HEAD = (
    "launcher", "jobs", "seconds", "step ms, median (min to max)", "process MiB in training", "in the whole sweep",
    "to the first step", "losses apart", "LoRAs apart",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    launcher: str
    jobs: int
    seconds: float  # of the whole command
    median_ms: float  # of a step: of all jobs if they are packed, else of one job
    min_ms: float
    max_ms: float
    training_mib: int | None  # of the process while the first job trains, by nvidia-smi
    process_mib: int | None
    seconds_to_first_step: float
    losses_apart: float | None  # mean relative difference of a job's losses; of all jobs the largest
    loras_apart: float | None  # relative norm of the difference of a job's LoRA; of all jobs the largest


def main() -> None:
    parser = make_parser("benchmarks.sweep", __doc__)
    parser.add_argument("--points", nargs="+", default=["rank=4,8,16,32", "lr=1e-4,5e-5"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--launchers", nargs="+", default=["packed", "basic"])
    parser.add_argument("--memory", default="fast", help="option of memory=")
    options = parse(parser)
    bench = prepare(options.out, options.dry)
    rows: list[Row] = []
    for launcher in options.launchers:
        folder = options.out / "sweeps" / launcher
        arguments = [
            "-m", *bench.overrides, *options.points, f"steps={options.steps}", f"memory={options.memory}",
            f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder}", "stage.prompts=[]", *options.also,
        ]  # fmt: skip
        beside = options.out / "sweeps" / options.launchers[0] if rows else None
        rows.append(measured(launcher, folder, arguments, options.steps, beside))
        write_table(options.out / "sweep", bench.machine, list(map(vars, rows)), HEAD, list(map(cells, rows)))


def measured(launcher: str, folder: Path, arguments: list[str], steps: int, beside: Path | None) -> Row:
    """Run a sweep into `folder`. Raises CalledProcessError with the sweep's output if it fails."""
    seconds, stats = watched(folder, arguments, folder / "0" / METRICS, steps)
    jobs = sorted((file.parent for file in folder.glob("*/result.json")), key=lambda job: int(job.name))
    # The second half of each: in the first half the graph is captured and code is compiled.
    times = [1000 / line["images_per_second"] for job in jobs for line in read_lines(job / METRICS)[steps // 2 :]]
    return Row(
        launcher=launcher,
        jobs=len(jobs),
        seconds=seconds,
        median_ms=statistics.median(times),
        min_ms=min(times),
        max_ms=max(times),
        training_mib=stats.training_mib,
        process_mib=stats.peak_mib,
        seconds_to_first_step=stats.seconds_to_first_step or float("nan"),
        losses_apart=beside and max(losses_apart(job, beside / job.name) for job in jobs),
        loras_apart=beside and max(loras_apart(job, beside / job.name) for job in jobs),
    )


def losses_apart(job: Path, other: Path) -> float:
    """The mean relative difference of the losses of two jobs' steps."""
    pairs = zip(read_lines(job / METRICS), read_lines(other / METRICS), strict=True)
    return statistics.mean(abs(line["loss"] / reference["loss"] - 1) for line, reference in pairs)


def loras_apart(job: Path, other: Path) -> float:
    """The norm of the difference of two jobs' LoRAs, relative to the second."""
    reference = lora(other)
    return ((lora(job) - reference).norm() / reference.norm()).item()


def lora(job: Path) -> torch.Tensor:
    """All numbers of a job's LoRA (N,)."""
    file = json.loads((job / "result.json").read_text(encoding="utf-8"))["lora"]
    return torch.cat([value.flatten() for _, value in sorted(load_file(job / file).items())])


def cells(row: Row) -> list:
    return [
        row.launcher, row.jobs, f"{row.seconds:.0f}", f"{row.median_ms:.1f} ({row.min_ms:.1f} to {row.max_ms:.1f})",
        row.training_mib or "", row.process_mib or "", f"{row.seconds_to_first_step:.1f} s",
        "" if row.losses_apart is None else f"{row.losses_apart:.2%}",
        "" if row.loras_apart is None else f"{row.loras_apart:.2%}",
    ]  # fmt: skip


if __name__ == "__main__":
    run_main(main)
