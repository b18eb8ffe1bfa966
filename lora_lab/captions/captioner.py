"""The captioner: any class or function that `captioner._target_` names and whose result writes captions for images."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import AfterValidator

from lora_lab.base.locate import locate_model
from lora_lab.errors import InputError, RunError
from lora_lab.settings.setting import bind_target, call_target

if TYPE_CHECKING:
    import torch
    from PIL import Image

MOST = 5  # different phrases that a line names
Settings = Mapping[str, Any]  # the group `captioner` of the configuration
CaptionModel = Annotated[str, AfterValidator(partial(locate_model, "captioner.base"))]  # a folder, or a hub id


class Captioner(Protocol):
    """What a captioner must offer. What it may offer besides:

    `phrases(images) -> list[list[tuple[str, float]]]`, without which captioner.min_confidence is refused: the phrases
    between the commas of each image's caption, each with the captioner's confidence, in [0, 1].
    `caption_with_hints(images, hints) -> list[str]`: as `caption`, with what the user wrote of each image, or "".
    `estimate(images) -> str`: what captioning will cost, in a line. `cost() -> str`: what it has cost; "" for nothing.
    """

    def caption(self, images: "list[Image.Image]") -> list[str]:
        """One caption for each image, in order, "" for none. Images are RGB, upright and opaque, of any size."""
        ...


def check_captioner(settings: Settings) -> None:
    """Raise InputError, naming the key, for a captioner that is not installed or whose settings are wrong.

    Nothing is loaded."""
    min_confidence(settings)
    bind_target("captioner", _arguments(settings), supplied=("device",))


def load_captioner(settings: Settings, device: "torch.device") -> Captioner:
    """The captioner of `settings`: `_target_` called with `device` and all keys but `name` and `min_confidence`.

    Raises InputError, naming the key, if it is not installed, its settings are wrong, or its model cannot be loaded."""
    return call_target("captioner", _arguments(settings), device=device)


def captioner_name(settings: Settings) -> str:
    """`captioner.name`, the author in captions.history.jsonl; without one the name of the class or function."""
    return settings.get("name") or settings["_target_"].rpartition(".")[2]


def images_per_call(settings: Settings) -> int:
    """`captioner.batch_size`; 1 for a captioner without this key."""
    return settings.get("batch_size") or 1


def min_confidence(settings: Settings) -> float:
    """`captioner.min_confidence`; 0 for a captioner without this key. Raises InputError for what is no number."""
    value = settings.get("min_confidence") or 0
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"captioner.min_confidence={value}: must be a number from 0, which is off, to 1")
    return value


def run_captioner(
    captioner: Captioner, images: "Sequence[Image.Image]", hints: Sequence[str] | None = None
) -> list[str]:
    """One caption for each RGB image; `hints`, one for each or None, are for a captioner that can use them.

    Raises RunError if the captioner returns another number of captions."""
    if hints and any(hints) and hasattr(captioner, "caption_with_hints"):
        captions = captioner.caption_with_hints(list(images), hints)
    else:
        captions = captioner.caption(list(images)) if images else []
    _check_number(captioner, len(captions), len(images))
    return captions


def certain_captions(
    captioner: Captioner, images: "Sequence[Image.Image]", least: float, hints: Sequence[str] | None = None
) -> list[tuple[str, tuple[str, ...]]]:
    """For each RGB image its caption without the phrases of a confidence below `least`, and those phrases.

    The first phrase names the subject and stays. 0 leaves out nothing.

    Raises InputError for a captioner that does not tell its confidence, RunError as `run_captioner`."""
    if not least:
        return [(caption, ()) for caption in run_captioner(captioner, images, hints)]
    if not hasattr(captioner, "phrases"):
        name = type(captioner).__qualname__
        raise InputError(f"captioner.min_confidence={least}: {name} does not tell its confidence, set it to 0")
    phrases = captioner.phrases(list(images)) if images else []
    _check_number(captioner, len(phrases), len(images))
    captions = []
    for own in phrases:
        certain = [phrase for i, (phrase, confidence) in enumerate(own) if i == 0 or confidence >= least]
        captions.append((", ".join(certain), tuple(phrase for phrase, confidence in own[1:] if confidence < least)))
    return captions


def left_out_line(left_out: Collection[Sequence[str]], least: float) -> str:
    """The line about the phrases that were left out of captions; "" for none."""
    counts = Counter(phrase for phrases in left_out for phrase in phrases)
    examples = ", ".join(f"{count} x {phrase!r}" for phrase, count in counts.most_common(MOST))
    rest = f" and {len(counts) - MOST} more" if len(counts) > MOST else ""
    number = sum(map(bool, left_out))
    line = f"left out of {number} captions as uncertain, by captioner.min_confidence={least:g}: {examples}{rest}"
    return line if counts else ""


def _check_number(captioner: Captioner, captions: int, images: int) -> None:
    if captions != images:
        name = type(captioner).__qualname__
        raise RunError(f"the captioner {name} returned {captions} captions for {images} images")


def _arguments(settings: Settings) -> Settings:
    return {key: value for key, value in settings.items() if key not in ("name", "min_confidence")}
