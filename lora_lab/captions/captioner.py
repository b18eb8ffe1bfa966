"""The captioner: any class or function that `captioner._target_` names and whose result writes captions for images."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lora_lab.errors import RunError
from lora_lab.settings.setting import bind_target, call_target

if TYPE_CHECKING:
    import torch
    from PIL import Image

Settings = Mapping[str, Any]  # the group `captioner` of the configuration


class Captioner(Protocol):
    """What a captioner must offer."""

    def caption(self, images: "list[Image.Image]") -> list[str]:
        """One caption for each image, in order. Images are RGB, upright and opaque, of any size."""
        ...


def check_captioner(settings: Settings) -> None:
    """Raise InputError, naming the key, for a captioner that is not installed or whose settings are wrong.

    Nothing is loaded."""
    bind_target("captioner", _arguments(settings), supplied=("device",))


def load_captioner(settings: Settings, device: "torch.device") -> Captioner:
    """The captioner of `settings`: `_target_` called with `device` and all keys but `name`.

    Raises InputError, naming the key, if it is not installed, its settings are wrong, or its model cannot be loaded."""
    return call_target("captioner", _arguments(settings), device=device)


def captioner_name(settings: Settings) -> str:
    """`captioner.name`, the author in captions.history.jsonl; without one the name of the class or function."""
    return settings.get("name") or settings["_target_"].rpartition(".")[2]


def images_per_call(settings: Settings) -> int:
    """`captioner.batch_size`; 1 for a captioner without this key."""
    return settings.get("batch_size") or 1


def run_captioner(captioner: Captioner, images: "Sequence[Image.Image]") -> list[str]:
    """One caption for each RGB image. Raises RunError if the captioner returns another number of captions."""
    captions = captioner.caption(list(images)) if images else []
    if len(captions) != len(images):
        name = type(captioner).__qualname__
        raise RunError(f"the captioner {name} returned {len(captions)} captions for {len(images)} images")
    return captions


def _arguments(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key != "name"}
