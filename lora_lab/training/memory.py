"""How much GPU memory a training is expected to take, and what to change where that is too much.

The constants are fitted to what `python -m benchmarks` measures at SDXL's size (docs/performance.md)."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_lab.errors import RunError
from lora_lab.settings.schema import Memory

LINEAR_WEIGHTS, CONVOLUTION_WEIGHTS = 2.233e9, 0.333e9  # numbers of SDXL's UNet; all others are few
TEXT_ENCODER_WEIGHTS = 0.818e9  # numbers; text encoders stay on the GPU only while a part of them is trained
BYTES_PER_WEIGHT = {"base": 2, "fp8": 1, "int8": 1, "nf4": 0.5625, "fp8_products": 2}
CONTEXT = 750  # MiB of the process beside torch's tensors: CUDA itself and its libraries
WEIGHTS_PER_RANK = 1.45e6  # numbers of a LoRA on the attention layers
ACTIVATIONS = {False: (350, 4610), True: (450, 560)}  # MiB (fixed, per image) without and with gradient checkpointing
UNET_SAMPLING = 1300  # MiB of the UNet's activations while it samples
TILED_DECODING = 1050  # MiB of the VAE in tiles; where 3,400 are free it decodes whole images
IMAGE_AREA = 1024 * 1024  # px of the images that these numbers are of


@dataclass(frozen=True)
class TrainingSize:
    """What decides the memory of a training."""

    memory: Memory
    rank: int
    batch_size: int
    resolution: int  # px
    trains_text: bool
    keeps_average: bool
    optimizer_state_bytes: float  # a trainable number


def expected_mib(size: TrainingSize) -> float:
    """The GPU memory in MiB of a training in half precision, validation images included, as nvidia-smi shows it.

    A captured step keeps its activations; without capture the VAE can use that memory between steps."""
    memory = size.memory
    base = LINEAR_WEIGHTS * BYTES_PER_WEIGHT[memory.linear_weights]
    base += CONVOLUTION_WEIGHTS * BYTES_PER_WEIGHT[memory.convolution_weights]
    base += TEXT_ENCODER_WEIGHTS * BYTES_PER_WEIGHT["base"] * size.trains_text
    copies = 2 + 4 + 2 + 4  # bytes: the model's copy, the master, and a gradient of each
    average = 4 if size.keeps_average else 0
    trainable = size.rank * WEIGHTS_PER_RANK * (copies + size.optimizer_state_bytes + average)
    fixed, per_image = ACTIVATIONS[memory.gradient_checkpointing]
    activations = max(fixed + per_image * size.batch_size * size.resolution**2 / IMAGE_AREA, UNET_SAMPLING)
    activations = activations + TILED_DECODING if memory.capture else max(activations, TILED_DECODING)
    return CONTEXT + (base + trainable) / 2**20 + activations


def describe_memory(size: TrainingSize, free_mib: float) -> str:
    """The line of the plan about memory, on a GPU of which `free_mib` MiB are free."""
    expected = expected_mib(size) - CONTEXT  # the context is taken already
    line = f"about {expected / 1024:.1f} GiB at SDXL's size, {free_mib / 1024:.1f} GiB are free"
    return line if expected < free_mib else f"{line}: if it runs out, {memory_hint(size.memory, size.batch_size)}"


def memory_hint(memory: Memory, batch_size: int) -> str:
    """What to set on the command line to need less memory than with `memory`."""
    smaller_batch = f", or batch_size={batch_size // 2} with stage.gradient_accumulation=2" if batch_size > 1 else ""
    if not memory.gradient_checkpointing:
        return f"use memory=balanced{smaller_batch}"
    if memory.linear_weights in ("base", "fp8_products"):
        return f"use memory=low{smaller_batch}"
    if memory.capture:
        return f"use memory=minimal{smaller_batch}"
    return f"use a smaller rank or model.resolution{smaller_batch}"


def out_of_memory_error(memory: Memory, batch_size: int, folder: Path) -> RunError:
    """The error for a run in `folder` that ran out of GPU memory: what to set, and how to resume."""
    resume = f", and resume with resume={folder}" if any((folder / "checkpoints").glob("step-*")) else ""
    return RunError(f"out of GPU memory: {memory_hint(memory, batch_size)}{resume}")


@contextmanager
def gc_paused() -> Iterator[None]:
    """Within the context the garbage collector is off.

    Building a network makes a hundred thousand objects; scanning all of them every few hundred takes a third of the
    time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def free_gpu_memory(device: torch.device) -> None:
    """Free what earlier trainings in this process held: networks and their hooks refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
