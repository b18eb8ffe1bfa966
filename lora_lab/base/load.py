"""Choose the device and precision, and load the base model that `model._target_` names."""

import torch
from hydra.utils import get_class

from lora_lab.base.protocol import BaseModel
from lora_lab.errors import InputError
from lora_lab.settings.schema import Loss, Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The torch device of that name; `auto` is cuda, else mps, else cpu. Raises InputError for an unusable device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name}: not usable here, use device=auto or device=cpu") from error
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the GPU has it, else float16; float32 on a CPU. Raises InputError for fp16 on a CPU."""
    if precision == "fp16" and device.type == "cpu":
        raise InputError("model.precision=fp16: needs a GPU, on a CPU use bf16 or fp32")  # no loss scaling there
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def base_class(model: Model) -> type[BaseModel]:
    """The class that `model._target_` names. Raises InputError if there is none."""
    try:
        return get_class(model._target_)
    except Exception as error:  # hydra wraps whatever importing the module raises
        raise InputError(f"model._target_={model._target_}: is no class that can be imported ({error})") from error


def load_base(model: Model, device: torch.device, waiting: bool = False) -> BaseModel:
    """The frozen base on `device`; with `waiting` on the CPU, in the precision for `device`.

    Raises InputError if the base cannot be read."""
    return base_class(model).load(model, device, waiting)


def validate_prediction(model: Model, loss: Loss) -> None:
    """Raise InputError, before the base is loaded, where `loss` is known not to fit it."""
    base_class(model).validate_loss(model, loss)
