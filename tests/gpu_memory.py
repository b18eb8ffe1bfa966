"""What the tests at SDXL's size ask of a GPU's memory; LORA_LAB_GPU_DRY=1 takes them through on a CPU."""

import gc
import os

import torch

DRY = os.environ.get("LORA_LAB_GPU_DRY") == "1"


def free() -> None:
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return 0.0 if DRY else round(torch.cuda.max_memory_allocated() / 2**30, 2)
