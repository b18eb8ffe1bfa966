"""One run of the program, measured from outside by its metrics.jsonl, the clock, and nvidia-smi."""

import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

INTERVAL = 0.1  # seconds between two measurements
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Row:
    name: str
    steps: int  # that were timed: the second half; in the first half kernels are chosen and captured
    median_ms: float
    min_ms: float
    max_ms: float
    images_per_second: float
    tflops: float  # without recomputed activations
    mfu: float | None  # tflops over the device's bf16 rate; None on a CPU
    allocated_mib: float  # torch's peak in training
    training_mib: int | None  # of the process in training, by nvidia-smi; None on a CPU
    process_mib: int | None  # of the process in the whole run, encoding and rendering included
    seconds_to_first_step: float  # since the start of the process
    kernels: dict | None = None  # of one step, by benchmarks.kernels; None without --kernels


def measure(folder: Path, overrides: list[str], steps: int, flops: float, peak: float | None) -> Row:
    """Train `steps` steps into `folder`, which is emptied. `flops` is per step, `peak` the device's TFLOP/s.

    Raises CalledProcessError with the run's output if it fails."""
    _, stats = watched(folder, [*overrides, f"steps={steps}", f"hydra.run.dir={folder}"], folder / METRICS, steps)
    lines = read_lines(folder / METRICS)
    batch = next(int(word.partition("=")[2]) for word in overrides if word.startswith("batch_size="))
    times = [1000 * batch / line["images_per_second"] for line in lines[len(lines) // 2 :]]
    median = statistics.median(times)
    tflops = flops / median / 1e9
    return Row(
        name=folder.name,
        steps=len(times),
        median_ms=median,
        min_ms=min(times),
        max_ms=max(times),
        images_per_second=1000 * batch / median,
        tflops=tflops,
        mfu=peak and tflops / peak,
        allocated_mib=lines[-1]["memory_mib"],
        training_mib=stats.training_mib,
        process_mib=stats.peak_mib,
        seconds_to_first_step=stats.seconds_to_first_step or float("nan"),
    )


def watched(folder: Path, arguments: list[str], metrics: Path, steps: int) -> tuple[float, "ProcessStats"]:
    """Run the program in `folder`, which is emptied: the seconds it took, and what was measured meanwhile.

    `metrics` is the file with a line per step, `steps` the number of lines at the end. Raises CalledProcessError with
    the run's output if it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "lora_lab", *arguments]
    start = time.perf_counter()
    run = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stats = ProcessStats()
    watcher = threading.Thread(target=watch, args=(run, metrics, steps, start, stats))
    watcher.start()
    try:
        output, _ = run.communicate()
        seconds = time.perf_counter() - start
    finally:
        run.kill()  # if this process is stopped: the run would go on and occupy the GPU
        watcher.join()
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, output[-3000:])
    return seconds, stats


def read_lines(file: Path) -> list[dict]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def kernels(folder: Path, overrides: list[str]) -> dict:
    """What the GPU computes in one step, from a second run: a profiler would slow down the run of `measure`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out = folder / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.kernels", str(out), "8", *overrides, "steps=20"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, (run.stdout + run.stderr)[-3000:])
    return json.loads(out.read_text(encoding="utf-8"))


@dataclass
class ProcessStats:
    """What is measured of a process while it runs."""

    peak_mib: int | None = None  # on the GPU
    training_mib: int | None = None  # likewise, while steps are done
    seconds_to_first_step: float | None = None


def watch(run: subprocess.Popen, metrics: Path, steps: int, start: float, stats: ProcessStats) -> None:
    """Measure `run` until it ends: when its first step is in `metrics`, and its peak memory on the GPU."""
    used = gpu_memory()
    while run.poll() is None:
        done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        if stats.seconds_to_first_step is None and done:
            stats.seconds_to_first_step = time.perf_counter() - start
        if used:
            mib = used()
            stats.peak_mib = max(stats.peak_mib or 0, mib)
            if 0 < done < steps:
                stats.training_mib = max(stats.training_mib or 0, mib)
        time.sleep(INTERVAL)


def gpu_memory() -> Callable[[], int] | None:
    """A function that gives the MiB in use on the first GPU, as nvidia-smi does; None on a CPU.

    No other process should use the GPU: on many hosts processes can't be told apart. nvidia-smi itself, started ten
    times a second, would slow down the steps that are timed."""
    if not torch.cuda.is_available():
        return None
    import pynvml

    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    return lambda: pynvml.nvmlDeviceGetMemoryInfo(device, version=pynvml.nvmlMemory_v2).used >> 20
