"""A run of the program that stops after a few steps and reports what the GPU computed in the last of them.

python -m benchmarks.kernels FOLDER/NAME.json STEP override ..."""

import json
import os
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.training.lora_training import LoRATraining, Update

KINDS = {  # by words in a kernel's name; the first match counts
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "convolution": ("conv", "fprop", "dgrad", "wgrad", "nchwto", "nhwcto", "winograd", "implicit"),
    "product": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "compiled": ("triton",),
    "norm": ("norm", "rowwisemoments"),
    "copy": ("memcpy", "memset", "copy"),
}


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "elementwise")


def watch(out: Path, at: int) -> None:
    """Profile step number `at` of the training that follows, and end the process after it."""
    update, steps = LoRATraining.clip_and_update, []
    on_gpu = torch.cuda.is_available()
    profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])

    def counted(training: LoRATraining) -> Update:
        result = update(training)
        steps.append(len(steps))
        if on_gpu:
            torch.cuda.synchronize()
        if len(steps) == at - 1:
            profiler.start()
        elif len(steps) == at:
            profiler.stop()
            out.write_text(json.dumps(summary(profiler)) + "\n", encoding="utf-8")
            os._exit(0)  # nothing after training is measured
        return result

    LoRATraining.clip_and_update = counted


def summary(profiler: profile) -> dict[str, object]:
    """Milliseconds and number of kernels: in total, by kind, and of the 20 longest."""
    events = profiler.key_averages()
    on_gpu = (e for e in events if str(e.device_type).endswith("CUDA"))
    kernels = [(e.key[:100], e.self_device_time_total / 1000, e.count) for e in on_gpu]
    if not torch.cuda.is_available():  # a dry run: operators instead of kernels
        kernels = [(e.key, e.self_cpu_time_total / 1000, e.count) for e in events]
    rows = sorted(kernels, key=lambda row: -row[1])
    kinds: dict[str, list[float]] = {}
    for name, ms, count in rows:
        kind = kinds.setdefault(kind_of(name), [0.0, 0])
        kind[0], kind[1] = kind[0] + ms, kind[1] + count
    return {
        "kernel_ms": sum(row[1] for row in rows),
        "kernels": sum(row[2] for row in rows),
        "by_kind": dict(sorted(kinds.items(), key=lambda item: -item[1][0])),
        "longest": rows[:20],
    }


if __name__ == "__main__":
    place, step = Path(sys.argv[1]), int(sys.argv[2])
    watch(place, step)
    run_stage(compose(*sys.argv[3:]), place.parent)
