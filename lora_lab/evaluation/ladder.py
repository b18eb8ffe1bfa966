"""A test of the judges: a LoRA and damaged copies of it, whose right order by likeness is known beforehand."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_lab.adapters.files import SCALED, embeddings_path, read_metadata
from lora_lab.errors import InputError
from lora_lab.runs import write_atomically

# The tensor of a layer that an update of the weights is proportional to, in the keys of other programs too.
ENDINGS = (*SCALED, "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight", "lora_B.default.weight")
WHOLE = "good"  # the name of the LoRA itself among its copies


NOISE = 3.0  # the noise's deviation, of the tensor's root mean square
BROKEN = {"x2.5": 0.1}  # what scores less than that


def _times(factor: float) -> Callable[[Tensor, int], Tensor]:
    return lambda tensor, _: tensor * factor


def _every_second(tensor: Tensor, place: int) -> Tensor:
    return torch.zeros_like(tensor) if place % 2 else tensor


def _noisy(tensor: Tensor, place: int) -> Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(place))
    values = tensor.float()
    return (values + NOISE * noise * values.square().mean().sqrt()).to(tensor.dtype)


# What is done to that tensor of a layer, and the layer's place in a random order: neighbours play different parts, so
# every second one in the file's order could be all value projections.
DAMAGES: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "x0.3": _times(0.3),
    "x0.6": _times(0.6),
    "x1.5": _times(1.5),
    "x2.5": _times(2.5),
    "half": _every_second,
    "noise": _noisy,
}
# The first is to score higher than the second. Nothing is said of the others: they may tie.
ORDER = (
    (WHOLE, "x0.6"),
    (WHOLE, "half"),
    (WHOLE, "x1.5"),
    (WHOLE, "noise"),
    ("x0.6", "x0.3"),
    ("half", "x0.3"),
    ("x0.3", "x2.5"),
)


@dataclass(frozen=True)
class Ladder:
    """How the judges order a LoRA and its damaged copies."""

    lora: str
    scores: dict[str, float]  # of `good`, which is the LoRA itself, and of each damage; the highest first
    wrong: list[str]  # what of ORDER and BROKEN does not hold
    as_expected: bool

    @classmethod
    def of(cls, lora: str, scores: Mapping[str, float]) -> "Ladder":
        """`scores` of the LoRA, by WHOLE, and of its copies, by the names of DAMAGES."""
        ordered = dict(sorted(scores.items(), key=lambda item: -item[1]))
        wrong = [f"{first} > {second}" for first, second in ORDER if not scores[first] > scores[second]]
        wrong += [f"{name} < {most}" for name, most in BROKEN.items() if not scores[name] < most]
        return cls(lora, ordered, wrong, not wrong)

    def describe(self) -> str:
        """In a line: the order with its scores, and which pairs are wrong."""
        names = list(self.scores)
        signs = ["=" if self.scores[one] == self.scores[next_one] else ">" for one, next_one in pairwise(names)]
        steps = [f"{name} {round(self.scores[name], 2) + 0:.2f}" for name in names]
        order = " ".join(word for pair in zip(steps, [*signs, ""], strict=True) for word in pair).strip()
        verdict = "as expected" if self.as_expected else f"not as expected: {', '.join(self.wrong)}"
        return f"{Path(self.lora).stem}: {order} ({verdict})"


def write_ladder(lora: Path, folder: Path, stem: str) -> dict[str, Path]:
    """Damaged copies of a LoRA file by the names of DAMAGES, in `folder` as STEM-NAME.safetensors, each with the
    metadata and embeddings of the file.

    The same file gives the same copies. Raises InputError for a file without a tensor that DAMAGES knows."""
    state, notes = load_file(str(lora)), read_metadata(lora)
    keys = [key for key in sorted(state) if key.partition(".")[2] in SCALED or key.endswith(ENDINGS)]
    if not keys:
        raise InputError(f"{lora.name} has no LoRA, LoHa or LoKr matrix to scale: a ladder cannot be made of it")
    folder.mkdir(parents=True, exist_ok=True)
    places = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0)).tolist()
    copies = {}
    for name, damage in DAMAGES.items():
        copies[name] = folder / f"{stem}-{name}.safetensors"
        damaged = state | {key: damage(state[key], place).contiguous() for key, place in zip(keys, places, strict=True)}
        write_atomically(copies[name], lambda file, tensors=damaged: save_file(tensors, str(file), metadata=notes))
        if embeddings_path(lora).is_file():
            shutil.copyfile(embeddings_path(lora), embeddings_path(copies[name]))
    return copies
