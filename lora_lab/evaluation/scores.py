"""Score LoRAs: draw the prompts of `score` with them and by the base, let the judges look, put the numbers together."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lora_lab.base.encode import Encoder
from lora_lab.base.locate import locate_folder
from lora_lab.captions.captioner import check_captioner
from lora_lab.captions.refiner import load_refiner, run_refiner
from lora_lab.evaluation import metrics
from lora_lab.evaluation.embedders import Embeddings, ImageEmbeddings, caption_images, embed, locate_embedders
from lora_lab.evaluation.metrics import Scale, Scores
from lora_lab.images.buckets import aspect_buckets, fit, nearest_bucket
from lora_lab.images.pixels import open_picture
from lora_lab.images.scan import find_pictures
from lora_lab.runs import write_text
from lora_lab.sampling.render import ImageSpec, image_specs, render_base, render_with_lora
from lora_lab.settings.schema import Config

MOST_REFERENCES = 64  # whose parts are compared one by one: of more, every second, third, ...


def validate_embedders(config: Config) -> None:
    """Raise InputError for a judge, or a captioner that is asked, that is not there."""
    if config.model.judge is None:
        return
    locate_embedders(config.model)
    if config.score.attributes:
        check_captioner(config.captioner)


def held_out_pictures(config: Config) -> list[Image.Image]:
    """Those of score.held_out as training would see them; [] without it. Raises InputError."""
    if config.model.judge is None or config.score.held_out is None:
        return []
    return pictures_in(locate_folder("score.held_out", config.score.held_out), "score.held_out", config)


def pictures_in(root: Path, key: str, config: Config) -> list[Image.Image]:
    """Every picture under `root`, cut into its bucket. Raises InputError, naming `key`, where there is none."""
    buckets = aspect_buckets(config.model.resolution, config.model.bucket_step)
    opened = [open_picture(path) for path in find_pictures(root, key).values()]
    return [fit(picture, nearest_bucket(picture.size, buckets)).picture for picture in opened]


@dataclass(frozen=True)
class ScoredImages:
    """What the pictures of one LoRA, or of the base alone, say of it."""

    name: str  # for people
    scores: Scores
    lines: list[dict]  # one a picture: lora, prompt, seed, picture, caption, and its numbers
    pictures: list[Image.Image]  # those with the trigger in the order of prompts and seeds, then the others


@dataclass(frozen=True)
class ScorePrompts:
    """What is drawn, and what is asked of it."""

    own: list[ImageSpec]  # with the trigger
    others: list[ImageSpec]  # without it
    texts: list[str]  # what CLIP reads of all prompts: the class noun in the trigger's place
    of_own: list[int]  # which of the texts each of `own` is of
    of_others: list[int]
    patterns: list[re.Pattern]  # of the attributes

    @classmethod
    def of(cls, config: Config) -> "ScorePrompts":
        score, noun = config.score, config.class_noun
        others = [text.replace("{class_noun}", noun) for text in score.other_prompts]
        return cls(
            own=image_specs(score.prompts, score.seeds, config.trigger),
            others=[
                replace(each, name=f"other-{each.name}")
                for each in image_specs(others, score.seeds[:1], config.trigger)
            ],
            texts=[*(text.replace("{trigger}", noun) for text in score.prompts), *others],
            of_own=[i for i in range(len(score.prompts)) for _ in score.seeds],
            of_others=[len(score.prompts) + i for i in range(len(others))],
            patterns=[re.compile(pattern) for pattern in score.attributes],
        )


@dataclass(frozen=True)
class ReferenceEmbeddings:
    """What one judge makes of the character's pictures."""

    training: Tensor  # (M, D)
    references: ImageEmbeddings  # of what drawn pictures are compared with

    @classmethod
    def of(cls, known: ImageEmbeddings, held_out: int) -> "ReferenceEmbeddings":
        """`known` are the training pictures, then those held out, which are the references if there are any."""
        count = len(known.whole) - held_out
        compared = slice(count, None) if held_out else slice(count)
        return cls(known.whole[:count], ImageEmbeddings(known.whole[compared], _some(known.parts[compared])))


def _some(references: Tensor) -> Tensor:
    return references[:: -(-len(references) // MOST_REFERENCES)]


class Evaluation:
    """Scores LoRAs of one character on one base.

    It is made before the base is loaded: a judge that cannot be loaded costs seconds then, not a training."""

    def __init__(
        self, config: Config, device: torch.device, training: Sequence[Image.Image], held_out: Sequence[Image.Image]
    ) -> None:
        """`training` is what the LoRAs learnt from; they are compared with `held_out`, if there are any."""
        self._config, self._device, self._asks = config, device, ScorePrompts.of(config)
        known = embed(config.model, [*training, *held_out], self._asks.texts, device)
        self._texts = known.texts
        self._clip = ReferenceEmbeddings.of(known.clip, len(held_out))
        self._dino = known.dino and ReferenceEmbeddings.of(known.dino, len(held_out))
        self._refiner = load_refiner(config.refiner)

    def begin(self, encoder: Encoder, base: str, dtype: torch.dtype, folder: Path) -> ScoredImages:
        """Score the base, which the LoRAs are measured by. `base` is the hash of its files."""
        asked = [*self._asks.own, *self._asks.others]
        pictures, files = render_base(asked, self._config, base, dtype, folder, encoder)
        seen = embed(self._config.model, pictures, [], self._device)
        captions = self._captions(pictures[: len(self._asks.own)])
        references, view = self._eye.references, seen.dino or seen.clip
        own, before = self._split(view)
        self._others_before = before.whole
        self._before = metrics.parts(own.parts, references.parts)
        contrast, others = self._contrasts(seen)
        self._scale = Scale(
            parts_before=self._before.mean().item(),
            parts_alike=metrics.alike(references.parts),
            contrast_before=contrast.mean().item(),
            attributes_before=self._read(captions).nanmean().item(),
            contrast_others_before=others.mean().item(),
        )
        return self._scored(None, pictures, files, seen, captions)

    def score(self, lora: Path, folder: Path, encoder: Encoder) -> ScoredImages:
        """Draw with the file into `folder`, and score that; after `begin`."""
        asked = [*self._asks.own, *self._asks.others]
        drawn = render_with_lora(lora, asked, folder, self._config, encoder)
        files = [folder / f"{each.name}.png" for each in asked]
        seen = embed(self._config.model, drawn, [], self._device)
        return self._scored(lora, drawn, files, seen, self._captions(drawn[: len(self._asks.own)]))

    @property
    def _eye(self) -> ReferenceEmbeddings:
        """DINOv2 tells subjects of a class better apart than CLIP, which looks for what captions say."""
        return self._dino or self._clip

    def _split(self, view: ImageEmbeddings) -> tuple[ImageEmbeddings, ImageEmbeddings]:
        """Of pictures with the trigger, and of those without."""
        own = len(self._asks.own)
        return ImageEmbeddings(view.whole[:own], view.parts[:own]), ImageEmbeddings(view.whole[own:], view.parts[own:])

    def _scored(
        self,
        lora: Path | None,
        pictures: list[Image.Image],
        files: list[Path],
        seen: Embeddings,
        captions: list[str | None],
    ) -> ScoredImages:
        eye, asks = self._eye, self._asks
        (own, others), (clip, _) = self._split(seen.dino or seen.clip), self._split(seen.clip)
        contrast, contrast_others = self._contrasts(seen)
        numbers = {
            "parts": metrics.parts(own.parts, eye.references.parts),
            "subject": metrics.subject(own.whole, eye.references.whole),
        }
        if self._dino:
            numbers["subject_clip"] = metrics.subject(clip.whole, self._clip.references.whole)
        numbers |= {
            "prompt": metrics.prompt(clip.whole, self._texts, asks.of_own),
            "contrast": contrast,
            "attributes": self._read(captions),
        }
        moved = {
            "contrast_others": contrast_others,
            "leakage": metrics.leakage(others.whole, self._others_before),
        }
        about_seeds = {
            "diversity": metrics.diversity(own.whole, asks.of_own),
            "memorised": metrics.memorised(own.whole, eye.training),
        }
        lines = [
            {"lora": lora and str(lora), "prompt": each.prompt, "seed": each.seed, "picture": str(file)}
            for each, file in zip([*asks.own, *asks.others], files, strict=True)
        ]
        for i, line in enumerate(lines):
            first = len(asks.own)
            group, at = (numbers | about_seeds, i) if i < first else (moved, i - first)
            line["caption"] = captions[i] if i < first else None
            line["scores"] = {name: _rounded(values[at].item()) for name, values in group.items()}
        # Picture by picture: how much a prompt's background is like the references' is no doubt about the LoRA.
        gained = {"gained": numbers["parts"] - self._before}
        found = metrics.estimates([numbers | about_seeds | gained, moved], self._together)
        scores = {name: found[name] for name in ("score", *numbers, *moved, *about_seeds)}
        return ScoredImages(lora.stem if lora else "without a LoRA", scores, lines, pictures)

    def _captions(self, pictures: list[Image.Image]) -> list[str | None]:
        """What the captioner says, in the words of the prompts; None where nothing is asked of it."""
        if not self._asks.patterns:
            return [None] * len(pictures)
        said = caption_images(self._config.captioner, pictures, self._device)
        return list(run_refiner(self._refiner, said, self._config.trigger))

    def _read(self, captions: list[str | None]) -> Tensor:
        """The share of a prompt's attributes that the caption names (N,), nan where there is none."""
        prompts = [each.prompt for each in self._asks.own]
        read = [
            metrics.attributes(prompt, caption or "", self._asks.patterns)
            for prompt, caption in zip(prompts, captions, strict=True)
        ]
        return torch.tensor([sum(right) / len(right) if right else math.nan for right in read])

    def _together(self, means: Mapping[str, Tensor]) -> Tensor:
        used = ("gained", "contrast", "attributes", "contrast_others")
        return metrics.combined(*(means[name] for name in used), self._scale)

    def _contrasts(self, seen: Embeddings) -> tuple[Tensor, Tensor]:
        """Of pictures with the trigger, and of those without."""
        own, others = self._split(seen.clip)
        texts, asks = self._texts, self._asks
        return metrics.contrast(own.whole, texts, asks.of_own), metrics.contrast(others.whole, texts, asks.of_others)


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def write_lines(folder: Path, scored: Sequence[ScoredImages]) -> Path:
    """scores.jsonl: what every picture got."""
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for each in scored for line in each.lines]
    return write_text(folder / "scores.jsonl", "".join(lines))


def numbers(scores: Scores) -> dict[str, float]:
    """For the tracker."""
    return {f"score/{name}": estimate.value for name, estimate in scores.items() if estimate}


def rows(scored: ScoredImages, rank: int, lr: float, step: int) -> list[dict]:
    """For the tracker's table: a row for every picture, of the same columns in every run."""
    names = list(dict.fromkeys(name for line in scored.lines for name in line["scores"]))
    return [
        {"rank": rank, "lr": lr, "step": step, "prompt": line["prompt"], "seed": line["seed"], "picture": picture}
        | {f"score/{name}": line["scores"].get(name) for name in names}  # one of them is called prompt
        for line, picture in zip(scored.lines, scored.pictures, strict=True)
    ]


def table(scored: Sequence[ScoredImages]) -> str:
    """A line for each LoRA, the best first, under the names of the measures."""
    names = [name for name in scored[0].scores if any(each.scores[name] for each in scored)]
    rows = [["", "score", "95 % of resamplings", *names[1:]]]
    for each in sorted(scored, key=lambda each: -each.scores["score"].value):
        score = each.scores["score"]
        others = [f"{round(each.scores[name].value, 2) + 0:.2f}" if each.scores[name] else "-" for name in names[1:]]
        rows.append([each.name, f"{score.value:.2f}", f"{score.low:.2f} to {score.high:.2f}", *others])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
