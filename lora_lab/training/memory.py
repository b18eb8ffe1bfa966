"""How much GPU memory a training is expected to take, and what to change where that is too much.

The base's figures (base.protocol.MemoryProfile) are fitted to what `python -m benchmarks` measures.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_lab.base.protocol import MemoryProfile
from lora_lab.errors import RunError
from lora_lab.runs import display_path
from lora_lab.settings.schema import Memory

BYTES_PER_WEIGHT = {"base": 2, "fp8": 1, "int8": 1, "nf4": 0.5625, "fp8_products": 2}
CONTEXT = 750  # MiB of the process beside torch's tensors: CUDA itself and its libraries


@dataclass(frozen=True)
class TrainingSize:
    """What decides the memory of a training."""

    profile: MemoryProfile  # of the base
    memory: Memory
    rank: int
    batch_size: int
    resolution: int  # px
    trains_text: bool
    keeps_average: bool
    optimizer_state_bytes: float  # a trainable number


def expected_mib(size: TrainingSize, tiling: bool | None = None) -> float:
    """The GPU memory in MiB of a training in half precision, validation images included, as nvidia-smi shows it.

    `tiling` is whether the VAE decodes in tiles, None for memory.vae_tiling. A captured step keeps its activations;
    without capture the VAE can use that memory between steps."""
    memory, profile = size.memory, size.profile
    base = profile.linears * BYTES_PER_WEIGHT[memory.linear_weights]
    base += profile.convolutions * BYTES_PER_WEIGHT[memory.convolution_weights]
    # Text encoders stay on the GPU only while a part of them is trained.
    base += profile.text_encoders * BYTES_PER_WEIGHT["base"] * size.trains_text
    copies = 2 + 4 + 2 + 4  # bytes: the model's copy, the master, and a gradient of each
    average = 4 if size.keeps_average else 0
    trainable = size.rank * profile.adapter * (copies + size.optimizer_state_bytes + average)
    fixed, per_image = profile.activations[memory.gradient_checkpointing]
    images = size.batch_size * size.resolution**2 / profile.image_area
    activations = max(fixed + per_image * images, profile.sampling)
    decoding = profile.decoding[memory.vae_tiling if tiling is None else tiling]
    activations = activations + decoding if memory.capture else max(activations, decoding)
    return CONTEXT + (base + trainable) / 2**20 + activations


def describe_memory(size: TrainingSize, free_mib: float) -> str:
    """The line of the plan about memory, on a GPU of which `free_mib` MiB are free."""
    expected, least = (expected_mib(size, tiling) - CONTEXT for tiling in (None, True))  # the context is taken already
    line = f"about {expected / 1024:.1f} GiB at SDXL's size, {free_mib / 1024:.1f} GiB are free"
    if expected < free_mib:
        return line
    if least < free_mib:
        return f"{line}: validation images are decoded in tiles, which takes {least / 1024:.1f} GiB"
    return f"{line}: if it runs out, {memory_hint(size.memory, size.batch_size)}"


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
    resume = f", and resume with resume={display_path(folder)}" if any((folder / "checkpoints").glob("step-*")) else ""
    return RunError(f"out of GPU memory: {memory_hint(memory, batch_size)}{resume}")
