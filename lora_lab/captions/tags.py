"""WD14 taggers (SmilingWolf's wd-*-tagger-v3 and their like) as captioners: tags of Danbooru, by onnxruntime."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt

from lora_lab.base.locate import loading
from lora_lab.captions.captioner import CaptionModel
from lora_lab.console import say
from lora_lab.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

FILES = ("model.onnx", "selected_tags.csv")
GENERAL, CHARACTER = "0", "4"  # categories of selected_tags.csv; all others are left out: 9 is the rating
KAOMOJI = {
    "0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^", "o_o",
    "u_u", "x_x", "|_|", "||_||",
}  # fmt: skip


def _tagger(base: str) -> str:
    """`base`. Raises InputError if onnxruntime is not installed, or a folder lacks a file of a tagger."""
    if find_spec("onnxruntime") is None:
        raise InputError('captioner=tags needs the package onnxruntime, which is missing: pip install "lora_lab[tags]"')
    missing = [name for name in FILES if Path(base).exists() and not Path(base, name).is_file()]
    if missing:
        raise InputError(f"captioner.base={base}: there is no {missing[0]}, name a folder with {' and '.join(FILES)}")
    return base


Threshold = Annotated[float, Field(ge=0, le=1)]
TaggerModel = Annotated[CaptionModel, AfterValidator(_tagger)]


@dataclass(frozen=True)
class Tag:
    """A tag that may be written."""

    position: int  # in the model's output
    text: str  # as it stands in captions
    threshold: float  # the confidence from which it is written


@dataclass(frozen=True)
class Tagger:
    """A loaded tagger with its tags."""

    session: Any
    tags: Sequence[Tag]
    size: int  # pixels of the square that the model sees
    batch_size: int

    def caption(self, images: "list[Image.Image]") -> list[str]:
        """The tags of each image, the most certain first. Images are RGB, upright and opaque, of any size."""
        return [", ".join(tag for tag, _ in phrases) for phrases in self.phrases(images)]

    def phrases(self, images: "list[Image.Image]") -> list[list[tuple[str, float]]]:
        """The tags of each image with their confidence, in [0, 1], the most certain first. Images are as above."""
        import numpy as np

        found: list[list[tuple[str, float]]] = []
        (pixels,) = self.session.get_inputs()
        for start in range(0, len(images), self.batch_size):
            batch = np.stack([tagger_pixels(image, self.size) for image in images[start : start + self.batch_size]])
            (confidences,) = self.session.run(None, {pixels.name: batch})
            found += [select(self.tags, row.tolist()) for row in confidences]
        return found


def select(tags: Sequence[Tag], confidences: Sequence[float]) -> list[tuple[str, float]]:
    """The tags whose confidence reaches their threshold, with it, the most certain first."""
    pairs = [(tag.text, confidences[tag.position]) for tag in tags if confidences[tag.position] >= tag.threshold]
    return sorted(pairs, key=lambda pair: -pair[1])


def tagger_pixels(image: "Image.Image", size: int) -> "np.ndarray":
    """An RGB image as the tagger sees it, (size, size, 3): BGR in [0, 255], float32, on a white square."""
    import numpy as np
    from PIL import Image

    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, tuple((side - length) // 2 for length in image.size))
    square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32)[:, :, ::-1]


def tag_text(tag: str, spaces: bool = True, escape_brackets: bool = False) -> str:
    r"""A tag as it stands in a caption: words with spaces, except in kaomoji, and brackets escaped as A1111 reads them.

    >>> tag_text("hatsune_miku_(cosplay)", escape_brackets=True)
    'hatsune miku \\(cosplay\\)'
    """
    text = tag.replace("_", " ") if spaces and tag not in KAOMOJI else tag
    return text.replace("(", r"\(").replace(")", r"\)") if escape_brackets else text


def load_tagger(
    base: TaggerModel,
    device: "torch.device",
    general_threshold: Threshold = 0.35,
    character_threshold: Threshold = 0.85,
    spaces: bool = True,
    escape_brackets: bool = False,
    exclude: Sequence[str] = (),
    batch_size: PositiveInt = 4,
) -> Tagger:
    """Load a tagger from a folder or a Hugging Face id: model.onnx with selected_tags.csv.

    Raises InputError if it does not exist, cannot be reached, or is no tagger of this kind."""
    with loading(base, f"the captioner {base} cannot be loaded", ": name a tagger's folder or hub id"):
        model, table = (_file(base, name) for name in FILES)
        rows = read_tags(table)
        session = _session(model, device)
        (pixels,), (confidences,) = session.get_inputs(), session.get_outputs()
        number, *sizes = pixels.shape
        if len(sizes) != 3 or sizes[0] != sizes[1] or sizes[2] != 3 or (number != 1 and isinstance(number, int)):
            raise InputError(f"captioner.base={base}: {model} reads {pixels.shape}, a WD14 tagger (N, size, size, 3)")
        if confidences.shape[-1] != len(rows):
            raise InputError(f"captioner.base={base}: {table} has {len(rows)} tags, {model} {confidences.shape[-1]}")
    thresholds, names = {GENERAL: general_threshold, CHARACTER: character_threshold}, {tag_text(tag) for tag in exclude}
    if unknown := names - {tag_text(name) for name, _ in rows}:
        say(f"captioner.exclude: the tagger has no tag {', '.join(sorted(unknown))}")
    tags = [
        Tag(position, tag_text(name, spaces, escape_brackets), thresholds[category])
        for position, (name, category) in enumerate(rows)
        if category in thresholds and tag_text(name) not in names
    ]
    return Tagger(session, tags, sizes[0], 1 if number == 1 else batch_size)


def read_tags(table: str) -> list[tuple[str, str]]:
    """Name and category of each tag, in the order of the model's output. Raises InputError for another table."""
    with Path(table).open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if not {"name", "category"} <= {*(rows.fieldnames or ())}:
            raise InputError(f"{table}: no columns name and category, as a tagger's {FILES[1]} has")
        return [(row["name"], row["category"]) for row in rows]


def _file(base: str, name: str) -> str:
    from huggingface_hub import hf_hub_download

    return str(Path(base, name)) if Path(base).exists() else hf_hub_download(base, name)


def _session(model: str, device: "torch.device") -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it would report to Microsoft, from its import on
    import onnxruntime

    options, providers = onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
    options.log_severity_level = 3  # errors
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    elif device.type == "cuda":
        say("the tagger runs on the CPU: onnxruntime-gpu in place of onnxruntime runs it on the GPU")
    return onnxruntime.InferenceSession(model, options, providers=providers)
