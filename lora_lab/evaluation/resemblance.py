"""Whether an image shows the character and still resembles the photo that it was drawn over.

Formulas on vectors of parts, on captions and on pixels come first, then the judge that applies them.
docs/resemblance.md says how well they agree with visual ranking."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from lora_lab.adapters.files import hash_of_dataset, triggers_of
from lora_lab.base.encode import Encoder
from lora_lab.base.locate import locate_folder
from lora_lab.captions.phrases import STOPWORDS
from lora_lab.captions.refiner import Refiner, run_refiner
from lora_lab.console import say
from lora_lab.evaluation.embedders import caption_images, image_parts
from lora_lab.evaluation.metrics import Estimate, best_cosines, estimates
from lora_lab.images.dataset import folder_prefix
from lora_lab.images.scan import pictures
from lora_lab.runs import display_path, hash_files
from lora_lab.sampling.generate import image_side
from lora_lab.settings.schema import Dataset, Model

MAX_REFERENCES = 64  # images that are compared one by one: of more, every second, third, ...
SIDE = 64  # pixels: images are compared in colour at this size
BORDER, SHOULDERS = SIDE // 16, SIDE * 5 // 8  # of the background: its width; below, a subject may touch the sides
BINS = (6, 7, 7)  # of OKLab's lightness, green to red and blue to yellow
WIDTH = 0.06  # of a bin, in OKLab: colours that are called by one name share bins
BETWEEN_ATTRIBUTES = re.compile(r"[,.;]|\b(?:with|wearing|in|on|at|and|holding|behind)\b", re.IGNORECASE)


@dataclass(frozen=True)
class OwnParts:
    """The parts of the character's images that no image of the base has: T vectors (D,) of each of M references.

    A part is found in an image whose best counterpart is nearer to the best one in other references than to the best
    one in the base's images. It weighs by how far these two are apart."""

    mean: Tensor  # (D,)
    deviation: Tensor  # (D,)
    references: Tensor  # (M, T, D), standardised unit vectors
    threshold: Tensor  # (M, T), a cosine
    weights: Tensor  # (M, T), of sum 1, or all 0 where the references have nothing of their own
    level: float  # the share that the references find in each other on average

    @classmethod
    def of(cls, references: Tensor, before: Tensor) -> "OwnParts":
        """For references (M, T, D) and images of the base (K, T, D), vectors of parts of any length."""
        deviation, mean = torch.std_mean(torch.cat([references, before]), dim=(0, 1), correction=0)
        references, before = (normalize((x - mean) / (deviation + 1e-5), dim=-1) for x in (references, before))
        among, base = best_cosines(references, references), best_cosines(references, before).amax(dim=2)
        count = len(references)
        if count > 1:
            own = torch.eye(count, dtype=torch.bool, device=references.device)[:, None]
            alike = among.masked_fill(own, -1).amax(dim=2)
        else:
            own, alike = torch.zeros(1, dtype=torch.bool, device=references.device), among[..., 0]
        gain = (alike - base).clamp(min=0)
        weights, threshold = gain / gain.sum().clamp(min=1e-9), (alike + base) / 2
        found = ((among > threshold[..., None]) & ~own) * weights[..., None]
        level = found.sum().item() / max(count - 1, 1)
        return cls(mean, deviation, references, threshold, weights, level)

    def standardised(self, images: Tensor) -> Tensor:
        """The unit vectors of images (N, T, D) that are compared, of the same shape."""
        return normalize((images - self.mean) / (self.deviation + 1e-5), dim=-1)

    def share(self, images: Tensor) -> Tensor:
        """How many of the own parts each of images (N, T, D) shows (N,): 0 for none, 1 as another reference does."""
        found = best_cosines(self.references, self.standardised(images)) > self.threshold[..., None]
        shares = (found * self.weights[..., None]).sum(dim=(0, 1)) / max(self.level, 1e-9)
        return shares.clamp(0, 1)


def attributes_of(prompt: str, trigger: str) -> list[str]:
    """What `prompt` says of the subject, one text for each attribute.

    >>> attributes_of("A TOFU with a green background, with short red hair, smiling", "TOFU")
    ['green background', 'short red hair', 'smiling']
    """
    phrases = BETWEEN_ATTRIBUTES.split(prompt.replace(trigger, " "))
    texts = [" ".join(word for word in phrase.split() if word.casefold() not in STOPWORDS) for phrase in phrases]
    return list(dict.fromkeys(text for text in texts if text))


def attributes_kept(prompt: str, caption: str, trigger: str) -> dict[str, float]:
    """For each attribute of `prompt` the fraction of its words that one attribute of `caption` has.

    >>> attributes_kept("a TOFU with short red hair, smiling", "a TOFU with long red hair, laughing", "TOFU")
    {'short red hair': 0.6666666666666666, 'smiling': 0.0}
    """
    said = [{*text.casefold().split()} for text in attributes_of(caption, trigger)]
    kept = {}
    for text in attributes_of(prompt, trigger):
        words = {*text.casefold().split()}
        kept[text] = max((len(words & other) / len(words) for other in said), default=0.0)
    return kept


@dataclass(frozen=True)
class Colours:
    """How often the colours of OKLab's bins occur in an image: each (C,), of sum 1."""

    background: Tensor  # along the upper edges
    subject: Tensor  # in the middle

    @classmethod
    def of(cls, image: Image.Image) -> "Colours":
        """Of an RGB image of any size."""
        lab = _oklab(image)
        top, sides = lab[:BORDER], lab[:SHOULDERS, [*range(BORDER), *range(SIDE - BORDER, SIDE)]]
        middle = lab[BORDER:, 2 * BORDER : SIDE - 2 * BORDER]
        border = torch.cat([top.reshape(-1, 3), sides.reshape(-1, 3)])
        return cls(_histogram(border), _histogram(middle.reshape(-1, 3)))


def colours_kept(photo: Colours, image: Colours) -> dict[str, float]:
    """The fraction of the photo's colours that the image has, in the background, and in the subject beside it."""
    background = torch.minimum(photo.background, image.background).sum().item()
    of_photo, of_image = ((x.subject - photo.background).clamp(min=0) for x in (photo, image))
    subject = torch.minimum(of_photo, of_image).sum() / of_photo.sum().clamp(min=1e-3)
    return {"colours of the background": background, "colours of the subject": subject.item()}


def structure(photo: Tensor, image: Tensor) -> float:
    """Whether parts are alike where those of the photo are: the correlation of both self-similarities (Shechtman and
    Irani 2007). It sees place and outline, not what is there. photo and image (T, D) are unit vectors."""
    pair = torch.stack([(parts @ parts.T).flatten() for parts in (photo, image)])
    return torch.corrcoef(pair)[0, 1].nan_to_num().item()


def clean(images: Tensor, known: Tensor, level: float) -> Tensor:
    """How much of each image is like anything known (N,): the mean over its parts of the best cosine in `known`, as a
    fraction of `level`. images (N, T, D) and known (K, T, D) are unit vectors."""
    return (best_cosines(images, known).amax(dim=2).mean(dim=1) / level).clamp(0, 1)


def reference_stride(count: int) -> int:
    """Of `count` images every which one is compared, so that these are at most MAX_REFERENCES."""
    return -(-count // MAX_REFERENCES) or 1


def references_of(lora: Path, dataset: Dataset, trigger: str) -> list[Path]:
    """The images of dataset.root, at most MAX_REFERENCES, if the file was trained on them; else []. Where others lie in
    a folder of the user's, these count, which is printed if the file names its own. Of a file with several characters
    they are those of the one that `trigger` names.

    Raises InputError for a missing folder and an unreadable file."""
    folders = [locate_folder("dataset.root", folder.root) for folder in dataset.folders if folder.root]
    images = {
        folder_prefix(folder, folders) + name: file
        for folder in folders
        for name, file in pictures(folder, dataset.follow_links).items()
    }
    files, trained = [*images.values()], triggers_of(lora)
    known = hash_of_dataset(lora)  # None: another program made the file
    if files and known != hash_files(*files):
        if any(str(folder.root).startswith("demo:") for folder in dataset.folders):
            return []  # the default, which is not the user's choice
        if known:
            root = ", ".join(display_path(folder).as_posix() for folder in folders)
            say(f"{lora.name} was trained on other images than {root} has: its images are compared with these")
    if trained:
        files = [images[name] for name in trained.own(images, trigger)]
    return files[:: reference_stride(len(files))]


@dataclass(frozen=True)
class Resemblance:
    """The scores of one image; each is between 0 and 1, and structure between -1 and 1."""

    character: float  # OwnParts.share
    kept: float  # the mean of `attributes`
    resemblance: float  # sqrt(character * kept)
    structure: float
    clean: float
    attributes: Mapping[str, float]  # how much is kept of each attribute of the prompt, and of the photo's colours

    @property
    def scores(self) -> dict[str, float]:
        """The numbers by name."""
        names = ("character", "kept", "resemblance", "structure", "clean")
        return {name: round(getattr(self, name), 4) for name in names}


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
    """The means of resemblance, kept and character over the images with these `scores`, and their intervals, as
    metrics.estimates gives them."""
    names = ("resemblance", "kept", "character")
    numbers = {name: torch.tensor([of_image[name] for of_image in scores]) for name in names}
    means = estimates([numbers], lambda of: of["resemblance"])
    return {name: means[name] for name in names}


@dataclass(frozen=True)
class DrawnImage:
    """An image, the number of its photo, and the prompt that it was drawn from."""

    image: Image.Image
    photo: int
    prompt: str


@dataclass(frozen=True)
class ResemblanceJudge:
    """Scores images that were drawn over photos."""

    model: Model
    captioner: Mapping[str, Any]  # its settings
    refiner: Refiner
    trigger: str
    side: int  # pixels of the square in which parts are compared
    own: OwnParts
    known: Tensor  # (K, T, D), of references, photos and the base's drawings
    level: float  # of clean
    photos: Tensor  # (P, T, D)
    colours: Sequence[Colours]  # of the photos

    @classmethod
    def load(
        cls,
        model: Model,
        captioner: Mapping[str, Any],
        refiner: Refiner,
        trigger: str,
        references: Sequence[Image.Image],
        photos: Sequence[Image.Image],
        before: Sequence[Image.Image],
        encoder: Encoder,
    ) -> "ResemblanceJudge":
        """For images of the character, and photos with what the base alone draws over them. No LoRA is attached.

        Raises InputError for a DINOv2 that cannot be loaded."""
        side = image_side(model)
        parts = image_parts(model, [*references, *photos, *before], side, encoder)
        first, last = len(references), len(references) + len(photos)
        own = OwnParts.of(parts[:first], parts[first:])
        known = own.standardised(parts)
        return cls(
            model=model,
            captioner=captioner,
            refiner=refiner,
            trigger=trigger,
            side=side,
            own=own,
            known=known,
            level=best_cosines(known[last:], known[:last]).amax(dim=2).mean().item(),
            photos=known[first:last],
            colours=[Colours.of(photo) for photo in photos],
        )

    def measure(self, drawings: Sequence[DrawnImage], encoder: Encoder) -> tuple[list[Resemblance], Tensor]:
        """The scores of each of N drawings, and its parts (N, T, D), unit vectors. No LoRA is attached.

        Raises InputError for a captioner that cannot be loaded."""
        images = [drawing.image for drawing in drawings]
        parts = image_parts(self.model, images, self.side, encoder)
        standardised, characters = self.own.standardised(parts), self.own.share(parts)
        cleans = clean(standardised, self.known, self.level)
        captions = run_refiner(self.refiner, caption_images(self.captioner, images, encoder.device), self.trigger)
        measured = []
        for i, (drawing, caption) in enumerate(zip(drawings, captions, strict=True)):
            attributes = attributes_kept(drawing.prompt, caption, self.trigger)
            attributes |= colours_kept(self.colours[drawing.photo], Colours.of(drawing.image))
            character, kept = characters[i].item(), statistics.mean(attributes.values())
            measured.append(
                Resemblance(
                    character=character,
                    kept=kept,
                    resemblance=math.sqrt(character * kept),
                    structure=structure(self.photos[drawing.photo], standardised[i]),
                    clean=cleans[i].item(),
                    attributes={name: round(value, 4) for name, value in attributes.items()},
                )
            )
        return measured, standardised


def _oklab(image: Image.Image) -> Tensor:
    """The image in OKLab (Ottosson 2020), in which equal distances look equal: (SIDE, SIDE, 3)."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    rgb = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_cones = torch.tensor([[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]])
    to_lab = torch.tensor([[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]])
    return (linear @ to_cones.T).clamp(min=0) ** (1 / 3) @ to_lab.T


@lru_cache(maxsize=1)
def _bins() -> Tensor:
    """The centres of the bins (C, 3)."""
    axes = [torch.linspace(0.1, 1, BINS[0]), *(torch.linspace(-0.25, 0.25, count) for count in BINS[1:])]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def _histogram(colours: Tensor) -> Tensor:
    """The mean share of each bin (C,) in colours (N, 3); a colour belongs to several bins by its distance."""
    shares = torch.softmax(-torch.cdist(colours, _bins()).square() / (2 * WIDTH**2), dim=1)
    return shares.mean(dim=0)
