"""How much of a GPU's memory a run will take, and what to do where that is too much.

The numbers are those of SDXL, fitted to what `python -m benchmarks` measures (docs/performance.md)."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_lab.errors import RunError
from lora_lab.settings.schema import Config, Memory

LINEARS, CONVOLUTIONS = 2.233e9, 0.333e9  # numbers of the UNet; all others are few
TEXT = 0.818e9  # numbers of the text encoders, which stay on the GPU only if something of the text learns
BYTES = {"base": 2, "fp8": 1, "int8": 1, "nf4": 0.5625, "fp8_products": 2}  # a number
CONTEXT = 750  # MiB of the process beside torch's tensors: CUDA itself and its libraries
LEARNT = 1.45e6  # numbers a rank, of a LoRA on the attention
ACTIVATIONS = {False: (350, 4610), True: (450, 560)}  # MiB without checkpointing and with it: at all, and a picture
DRAWING = 1300  # MiB of the UNet while it draws
DECODING = 1050  # MiB of the VAE in tiles; where there are 3,400 it decodes whole pictures
AREA = 1024 * 1024  # pixels of such a picture


def expected_mib(config: Config) -> float:
    """What a training run needs of a CUDA GPU in half precision, validation pictures included, as nvidia-smi shows it.

    What a recorded step computes with stays the graph's; without one the memory is free for the VAE between steps."""
    memory = config.memory
    base = LINEARS * BYTES[memory.linear_weights] + CONVOLUTIONS * BYTES[memory.convolution_weights]
    base += TEXT * BYTES["base"] * config.text.learns
    kept = 2 if "8bit" in config.optimizer["_target_"] else 8  # bytes a number, of the optimizer's averages
    # working copy, master, and a gradient of either
    learnt = config.rank * LEARNT * (2 + 4 + 2 + 4 + kept + (4 if config.stage.ema_decay else 0))
    at_all, a_picture = ACTIVATIONS[memory.gradient_checkpointing]
    pictures = config.batch_size * config.model.resolution**2 / AREA
    working = max(at_all + a_picture * pictures, DRAWING)
    working = working + DECODING if memory.capture else max(working, DECODING)
    return CONTEXT + (base + learnt) / 2**20 + working


def memory_line(config: Config, free_mib: float) -> str:
    """What the plan says of it, on a GPU of which `free_mib` are free."""
    expected = expected_mib(config) - CONTEXT  # what it takes from there on is in what is free
    line = f"about {expected / 1024:.1f} GiB at SDXL's size, {free_mib / 1024:.1f} GiB are free"
    return line if expected < free_mib else f"{line}: if it ends there, {memory_hint(config.memory, config.batch_size)}"


def memory_hint(memory: Memory, batch_size: int) -> str:
    """What to say on the command line, to need less than with `memory`."""
    fewer = f", or batch_size={batch_size // 2} with stage.gradient_accumulation=2" if batch_size > 1 else ""
    if not memory.gradient_checkpointing:
        return f"say memory=balanced{fewer}"
    if memory.linear_weights in ("base", "fp8_products"):
        return f"say memory=low{fewer}"
    if memory.capture:
        return f"say memory=minimal{fewer}"
    return f"say a smaller rank or model.resolution{fewer}"


def out_of_memory_error(config: Config, folder: Path) -> RunError:
    """What to say where the GPU's memory ended in the run of `folder`."""
    goes_on = f", and go on with resume={folder}" if any((folder / "checkpoints").glob("step-*")) else ""
    return RunError(f"the GPU's memory is not enough: {memory_hint(config.memory, config.batch_size)}{goes_on}")


@contextmanager
def gc_paused() -> Iterator[None]:
    """Within the context no garbage is looked for: a network is made of a hundred thousand objects, and to look at all
    of them again for every few hundred more takes a third of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def free_gpu_memory(device: torch.device) -> None:
    """Give back what earlier jobs in this process held: their networks and hooks hold each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
