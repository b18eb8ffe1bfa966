"""One run of the program, measured from outside: its own metrics.jsonl, the clock, and nvidia-smi."""

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

EVERY = 0.1  # seconds between two looks
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Row:
    name: str
    steps: int  # that were timed: the second half, for the first choose kernels and record them
    median_ms: float
    least_ms: float
    most_ms: float
    images_per_second: float
    tflops: float  # of the mathematics of training, recomputing not counted
    mfu: float | None  # tflops over the device's own rate; None on a CPU
    allocated_mib: float  # by torch in training, at its peak
    training_mib: int | None  # of the process as nvidia-smi sees it, while steps are done; None on a CPU
    process_mib: int | None  # of the whole run, encoding and drawing included
    seconds_to_first_step: float  # since the start of the process
    kernels: dict | None = None  # of one step: what benchmarks.kernels says; None unless asked for


def measure(folder: Path, overrides: list[str], steps: int, flops: float, peak: float | None) -> Row:
    """Train `steps` steps into `folder`, which is emptied. `flops` a step; `peak` the device's TFLOP/s.

    Raises CalledProcessError with the run's own words if it fails."""
    _, seen = watched(folder, [*overrides, f"steps={steps}", f"hydra.run.dir={folder}"], folder / METRICS, steps)
    lines = read_lines(folder / METRICS)
    batch = next(int(word.partition("=")[2]) for word in overrides if word.startswith("batch_size="))
    times = [1000 * batch / line["images_per_second"] for line in lines[len(lines) // 2 :]]
    median = statistics.median(times)
    tflops = flops / median / 1e9
    return Row(
        name=folder.name,
        steps=len(times),
        median_ms=median,
        least_ms=min(times),
        most_ms=max(times),
        images_per_second=1000 * batch / median,
        tflops=tflops,
        mfu=peak and tflops / peak,
        allocated_mib=lines[-1]["memory_mib"],
        training_mib=seen.in_training_mib,
        process_mib=seen.most_mib,
        seconds_to_first_step=seen.first_step or float("nan"),
    )


def watched(folder: Path, arguments: list[str], metrics: Path, steps: int) -> tuple[float, "Seen"]:
    """Run the program in `folder`, which is emptied: the seconds it took, and what was seen of it from outside.

    `metrics` is the file that tells of its steps, `steps` how many lines that will have. Raises CalledProcessError with
    the run's own words if it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "lora_lab", *arguments]
    began = time.perf_counter()
    run = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = Seen()
    watcher = threading.Thread(target=watch, args=(run, metrics, steps, began, seen))
    watcher.start()
    try:
        said, _ = run.communicate()
        seconds = time.perf_counter() - began
    finally:
        run.kill()  # where this process is stopped: the GPU would not be free for who comes next
        watcher.join()
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, said[-3000:])
    return seconds, seen


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def kernels(folder: Path, overrides: list[str]) -> dict:
    """What the GPU computes in one step, from a second run: a profiler would disturb what `measure` measures."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out = folder / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.kernels", str(out), "8", *overrides, "steps=20"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, (run.stdout + run.stderr)[-3000:])
    return json.loads(out.read_text(encoding="utf-8"))


@dataclass
class Seen:
    most_mib: int | None = None
    in_training_mib: int | None = None
    first_step: float | None = None


def watch(run: subprocess.Popen, metrics: Path, steps: int, began: float, seen: Seen) -> None:
    """While `run` lives: when its first step is written down, and the most memory it holds on the GPU."""
    used = gpu_memory()
    while run.poll() is None:
        done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        if seen.first_step is None and done:
            seen.first_step = time.perf_counter() - began
        if used:
            now = used()
            seen.most_mib = max(seen.most_mib or 0, now)
            if 0 < done < steps:
                seen.in_training_mib = max(seen.in_training_mib or 0, now)
        time.sleep(EVERY)


def gpu_memory() -> Callable[[], int] | None:
    """Tells the MiB in use on the first GPU, as nvidia-smi does; None on a CPU.

    The GPU should have nothing else to do: on many hosts processes can't be told apart. nvidia-smi itself, started ten
    times a second, would hold up the steps that are timed."""
    if not torch.cuda.is_available():
        return None
    import pynvml

    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    return lambda: pynvml.nvmlDeviceGetMemoryInfo(device, version=pynvml.nvmlMemory_v2).used >> 20
