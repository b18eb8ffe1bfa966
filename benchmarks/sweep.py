"""What a sweep of LoRAs costs at SDXL's size, packed and job by job, and whether both learn the same.

python -m benchmarks.sweep OUT [--points rank=4,8,16,32 lr=1e-4,5e-5] [--steps 500] [--launchers packed basic] [--dry]
    [--memory fast] [--also compile=blocks ...]

The base and the pictures are those of `python -m benchmarks`. A row is one command, timed from its start to its end:
all jobs with data, logging, checkpoint and LoRA file, without pictures. Where there are two rows, the second also
says how far its jobs are from the first's: same data, same noise, so every step's losses compare."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.command import carry_out, parsed, parser_of
from benchmarks.prepare import prepare
from benchmarks.row import METRICS, read_lines, watched
from benchmarks.table import write_table

HEAD = (
    "launcher", "jobs", "seconds", "step ms, median (least to most)", "process MiB in training", "in the whole sweep",
    "to the first step", "losses apart", "LoRAs apart",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    launcher: str
    jobs: int
    seconds: float  # of the whole command
    median_ms: float  # of a step: of all jobs at once where they are packed, else of one job
    least_ms: float
    most_ms: float
    training_mib: int | None  # of the process as nvidia-smi sees it, while the first job's steps are done
    process_mib: int | None
    seconds_to_first_step: float
    losses_apart: float | None  # of a job: the mean of its steps' differences, as a share; of all jobs the largest
    loras_apart: float | None  # largest norm of two jobs' difference, as a share of the LoRA's


def main() -> None:
    parser = parser_of("benchmarks.sweep", __doc__)
    parser.add_argument("--points", nargs="+", default=["rank=4,8,16,32", "lr=1e-4,5e-5"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--launchers", nargs="+", default=["packed", "basic"])
    parser.add_argument("--memory", default="fast", help="option of memory=")
    asked = parsed(parser)
    bench = prepare(asked.out, asked.dry)
    rows: list[Row] = []
    for launcher in asked.launchers:
        folder = asked.out / "sweeps" / launcher
        arguments = [
            "-m", *bench.overrides, *asked.points, f"steps={asked.steps}", f"memory={asked.memory}",
            f"hydra/launcher={launcher}", f"hydra.sweep.dir={folder}", "stage.prompts=[]", *asked.also,
        ]  # fmt: skip
        beside = asked.out / "sweeps" / asked.launchers[0] if rows else None
        rows.append(measured(launcher, folder, arguments, asked.steps, beside))
        write_table(asked.out / "sweep", bench.machine, list(map(vars, rows)), HEAD, list(map(cells, rows)))


def measured(launcher: str, folder: Path, arguments: list[str], steps: int, beside: Path | None) -> Row:
    """Carry out a sweep into `folder`. Raises CalledProcessError with its own words if it fails."""
    seconds, seen = watched(folder, arguments, folder / "0" / METRICS, steps)
    jobs = sorted((file.parent for file in folder.glob("*/result.json")), key=lambda job: int(job.name))
    # The second half of each: a graph is recorded, and code compiled, in the first.
    times = [1000 / line["images_per_second"] for job in jobs for line in read_lines(job / METRICS)[steps // 2 :]]
    return Row(
        launcher=launcher,
        jobs=len(jobs),
        seconds=seconds,
        median_ms=statistics.median(times),
        least_ms=min(times),
        most_ms=max(times),
        training_mib=seen.in_training_mib,
        process_mib=seen.most_mib,
        seconds_to_first_step=seen.first_step or float("nan"),
        losses_apart=beside and max(losses_apart(job, beside / job.name) for job in jobs),
        loras_apart=beside and max(loras_apart(job, beside / job.name) for job in jobs),
    )


def losses_apart(job: Path, other: Path) -> float:
    pairs = zip(read_lines(job / METRICS), read_lines(other / METRICS), strict=True)
    return statistics.mean(abs(one["loss"] / alike["loss"] - 1) for one, alike in pairs)


def loras_apart(job: Path, other: Path) -> float:
    one, alike = lora(job), lora(other)
    return ((one - alike).norm() / alike.norm()).item()


def lora(job: Path) -> torch.Tensor:
    file = json.loads((job / "result.json").read_text(encoding="utf-8"))["lora"]
    return torch.cat([value.flatten() for _, value in sorted(load_file(job / file).items())])


def cells(row: Row) -> list:
    return [
        row.launcher, row.jobs, f"{row.seconds:.0f}", f"{row.median_ms:.1f} ({row.least_ms:.1f} to {row.most_ms:.1f})",
        row.training_mib or "", row.process_mib or "", f"{row.seconds_to_first_step:.1f} s",
        "" if row.losses_apart is None else f"{row.losses_apart:.2%}",
        "" if row.loras_apart is None else f"{row.loras_apart:.2%}",
    ]  # fmt: skip


if __name__ == "__main__":
    carry_out(main)
