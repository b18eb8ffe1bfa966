"""One run of the program, measured from outside: its own metrics.jsonl, the clock, and nvidia-smi."""

import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.1  # seconds between two looks


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
    process_mib: int | None  # of the whole run, as nvidia-smi sees it; None on a CPU
    seconds_to_first_step: float  # since the start of the process
    kernels: dict | None = None  # of one step: what benchmarks.kernels says; None unless asked for


def measure(folder: Path, overrides: list[str], steps: int, flops: float, peak: float | None) -> Row:
    """Train `steps` steps into `folder`, which is emptied. `flops` a step; `peak` the device's TFLOP/s.

    Raises CalledProcessError with the run's own words if it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "lora_lab", *overrides, f"steps={steps}", f"hydra.run.dir={folder}"]
    began = time.perf_counter()
    run = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = Seen()
    watcher = threading.Thread(target=watch, args=(run, folder / "metrics.jsonl", began, seen))
    watcher.start()
    said, _ = run.communicate()
    watcher.join()
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, said[-3000:])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
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
        process_mib=seen.most_mib,
        seconds_to_first_step=seen.first_step or float("nan"),
    )


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
    first_step: float | None = None


def watch(run: subprocess.Popen, metrics: Path, began: float, seen: Seen) -> None:
    """While `run` lives: when its first step is written down, and the most memory it holds on the GPU."""
    has_gpu = shutil.which("nvidia-smi") is not None
    while run.poll() is None:
        if seen.first_step is None and metrics.is_file() and metrics.stat().st_size:
            seen.first_step = time.perf_counter() - began
        if has_gpu:
            used = memory_used()
            seen.most_mib = max(seen.most_mib or 0, used)
        time.sleep(EVERY)


def memory_used() -> int:
    """MiB in use on the first GPU. It should have nothing else to do: on many hosts processes can't be told apart."""
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0])
