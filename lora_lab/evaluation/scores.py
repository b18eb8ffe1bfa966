"""Score LoRAs: render the prompts of `score` with them and with the base, embed the images, and compute metrics."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Encoder
from lora_lab.base.locate import locate_folder
from lora_lab.captions.captioner import check_captioner
from lora_lab.captions.refiner import Refiner, load_refiner, run_refiner
from lora_lab.errors import InputError
from lora_lab.evaluation import metrics
from lora_lab.evaluation.embedders import Embeddings, base_parts, caption_images, embed, locate_embedders
from lora_lab.evaluation.metrics import Estimate, Scale, Scores
from lora_lab.evaluation.photos import PhotoScorer, ScoredPhoto
from lora_lab.evaluation.resemblance import reference_stride
from lora_lab.images.pixels import aspect_buckets, open_fitted, open_picture
from lora_lab.images.scan import find_pictures
from lora_lab.runs import write_json, write_text
from lora_lab.sampling.generate import (
    ImageSpec,
    RenderSettings,
    check_strength,
    image_specs,
    render_base,
    render_with_lora,
    save_image,
)
from lora_lab.settings.schema import Model, Score, Triggers

OF_PHOTOS = ("resemblance", "kept", "character")  # Resemblance.scores that a LoRA has


@dataclass(frozen=True)
class ScorePrompts:
    """What is rendered, and what is expected of it."""

    character: list[ImageSpec]  # with the trigger
    others: list[ImageSpec]  # without it
    texts: list[str]  # all prompts for CLIP: the class noun in place of the trigger
    character_texts: list[int]  # for each of `character` the index of its text
    other_texts: list[int]
    patterns: list[re.Pattern]  # of the attributes
    prefix: str  # of the names of all images

    @classmethod
    def of(cls, score: Score, trigger: str, class_noun: str, prefix: str = "") -> "ScorePrompts":
        """The prompts of `score` for one character."""
        others = [text.replace("{class_noun}", class_noun) for text in score.other_prompts]
        texts = [text.replace("{trigger}", trigger) for text in score.prompts]
        character, rest = image_specs(texts, score.seeds), image_specs(others, score.seeds[:1])
        return cls(
            character=[replace(spec, name=f"{prefix}{spec.name}") for spec in character],
            others=[replace(spec, name=f"{prefix}other-{spec.name}") for spec in rest],
            texts=[*(text.replace("{trigger}", class_noun) for text in score.prompts), *others],
            character_texts=[i for i in range(len(score.prompts)) for _ in score.seeds],
            other_texts=[len(score.prompts) + i for i in range(len(others))],
            patterns=[re.compile(pattern) for pattern in score.attributes],
            prefix=prefix,
        )

    @property
    def specs(self) -> list[ImageSpec]:
        """All images, in the order of rendering."""
        return [*self.character, *self.others]


def validate_embedders(model: Model, score: Score, captioner: Mapping[str, Any]) -> None:
    """Raise InputError for a missing model that the scores need."""
    locate_embedders(model)
    if score.attributes or score.photos is not None:
        check_captioner(captioner)
    if score.photos is not None:
        check_strength(score.photo_steps, model.strength, "score.photo_steps")


Pictures = Mapping[str, list[Image.Image]]  # of each character, by its trigger


def held_out_pictures(model: Model, score: Score, triggers: Triggers) -> Pictures:
    """The images of score.held_out, cropped as training would; {} without it. Raises InputError, also for an image in
    no folder of a trigger."""
    if score.held_out is None:
        return {}
    files = find_pictures(locate_folder("score.held_out", score.held_out), "score.held_out")
    return open_pictures(files, triggers, model)


def open_pictures(files: Mapping[str, Path], triggers: Triggers, model: Model) -> Pictures:
    """The images by name, cropped to their buckets. Raises InputError."""
    buckets = aspect_buckets(model.resolution, model.bucket_step)
    by_trigger = triggers.names_by_trigger(files)
    return {trigger: [open_fitted(files[name], buckets) for name in names] for trigger, names in by_trigger.items()}


@dataclass(frozen=True)
class ScoredImages:
    """The images and scores of one LoRA, or of the base alone."""

    name: str  # for people
    scores: Scores
    lines: list[dict]  # one per image: lora, prompt, seed, picture, caption, and its scores
    pictures: list[Image.Image]  # those with the trigger in the order of prompts and seeds, the others, the photos'


@dataclass(frozen=True)
class ReferenceEmbeddings:
    """One model's embeddings of the character's images."""

    training: Tensor  # (M, D)
    references: Tensor  # (R, D), what rendered images are compared with

    @classmethod
    def of(cls, whole: Tensor, held_out: int) -> "ReferenceEmbeddings":
        """`whole` (M + held_out, D) is of the training images, then of held-out ones, which are the references if there
        are any."""
        count = len(whole) - held_out
        return cls(whole[:count], whole[count:] if held_out else whole)


@dataclass(frozen=True)
class Baseline:
    """What the base scores without a LoRA, which LoRAs are measured by."""

    character: metrics.DistinctiveParts  # of the references, against the base's images of the same prompts
    parts: Tensor  # (N,) found in each image with the trigger
    others: Tensor  # (M, D) embeddings of the images without the trigger
    scale: Scale


@dataclass
class Scorer:
    """Scores LoRAs of one character on one base; `score_base` comes first."""

    prompts: ScorePrompts
    model: Model
    captioner: Mapping[str, Any]  # its settings
    refiner: Refiner
    trigger: str
    device: torch.device
    texts: Tensor  # (T, D) CLIP's embeddings of the prompts' texts
    clip: ReferenceEmbeddings
    dino: ReferenceEmbeddings | None
    references: Sequence[Image.Image]  # until score_base
    reference_parts: Tensor | None  # (R, T, E) of DINOv2, until score_base; None without it
    photos: PhotoScorer | None
    baseline: Baseline | None = field(default=None, init=False)

    @classmethod
    def load(
        cls,
        prompts: ScorePrompts,
        model: Model,
        captioner: Mapping[str, Any],
        refiner: Mapping[str, Any],
        trigger: str,
        training: Sequence[Image.Image],
        held_out: Sequence[Image.Image],
        score: Score,
        device: torch.device,
    ) -> "Scorer":
        """Embed what the LoRAs were trained on; they are compared with `held_out`, if there are any images in it.
        `score` has the photos.

        To be called before the base is loaded: an embedder that cannot be loaded then costs seconds, not a training.
        Raises InputError for such an embedder, and for wrong settings of the refiner."""
        embeddings = embed(model, [*training, *held_out], prompts.texts, device)
        references = held_out or training
        stride = reference_stride(len(references))
        rewriter = load_refiner(refiner)
        return cls(
            prompts=prompts,
            model=model,
            captioner=captioner,
            refiner=rewriter,
            trigger=trigger,
            device=device,
            texts=embeddings.texts,
            clip=ReferenceEmbeddings.of(embeddings.clip, len(held_out)),
            dino=embeddings.dino and ReferenceEmbeddings.of(embeddings.dino.whole, len(held_out)),
            references=references[::stride],
            reference_parts=embeddings.dino and embeddings.dino.parts[-len(references) :][::stride],
            photos=PhotoScorer.load(score, model, captioner, rewriter, trigger, device),
        )

    def score_base(self, render: RenderSettings, folder: Path, encoder: Encoder) -> ScoredImages:
        """Render with the base alone and score that; `folder` is the run's. Raises RunError for non-finite values."""
        pictures, files = render_base(self.prompts.specs, render, folder, encoder)
        embeddings = embed(self.model, pictures, [], self.device)
        captions = self._captions(pictures[: len(self.prompts.character)])
        parts = self._parts(pictures, embeddings, render.side, encoder)
        references = self.reference_parts
        if references is None:
            references = self._base_parts(self.references, render.side, encoder)
        character = metrics.DistinctiveParts.of(references.to(self.device), parts)
        photos = self.photos.score_base(self.references, render.sampler, encoder) if self.photos else []
        self.references, self.reference_parts = (), None
        contrast, contrast_others = self._contrasts(embeddings)
        scale = Scale(
            contrast_before=contrast.mean().item(),
            attributes_before=self._attributes(captions).nanmean().item(),
            contrast_others_before=contrast_others.mean().item(),
        )
        found = character.found(parts).cpu()
        self.baseline = Baseline(character, found, self._others(self._whole(embeddings)), scale)
        scored = self._scored(None, pictures, files, embeddings, captions, found, photos)
        return self._with_photos(scored, None, photos, folder / "drawn")

    def score(self, lora: Path, render: RenderSettings, folder: Path, encoder: Encoder) -> ScoredImages:
        """Render with the LoRA file into `folder` and score that, after score_base.

        Raises InputError for a file that does not fit, RunError for non-finite values."""
        specs = self.prompts.specs
        pictures = render_with_lora(lora, specs, folder, render, encoder)
        files = [folder / f"{spec.name}.png" for spec in specs]
        embeddings = embed(self.model, pictures, [], self.device)
        captions = self._captions(pictures[: len(self.prompts.character)])
        parts = self._parts(pictures, embeddings, render.side, encoder)
        photos = self.photos.score(lora, render.sampler, encoder) if self.photos else []
        found = self.baseline.character.found(parts).cpu()
        scored = self._scored(lora, pictures, files, embeddings, captions, found, photos)
        return self._with_photos(scored, lora, photos, folder)

    def _with_photos(
        self, scored: ScoredImages, lora: Path | None, photos: Sequence[ScoredPhoto], folder: Path
    ) -> ScoredImages:
        """`scored`, and the images over photos, which are saved into `folder`."""
        lines = []
        for each in photos:
            request, file = each.request, folder / f"{self.prompts.prefix}photo-{each.name}.png"
            save_image(
                file, each.image, ImageSpec(each.name, request.prompt, request.seed), lora.name if lora else "none"
            )
            lines.append(
                {"lora": lora and str(lora), "prompt": request.prompt, "seed": request.seed, "picture": str(file)}
                | {"photo": str(each.photo), "caption": None, "scores": each.judged.scores}
            )
        images = [each.image for each in photos]
        return replace(scored, lines=[*scored.lines, *lines], pictures=[*scored.pictures, *images])

    def _parts(self, pictures: Sequence[Image.Image], embeddings: Embeddings, side: int, encoder: Encoder) -> Tensor:
        """The vectors (N, T, D) of the parts of images with the trigger, on the device: by DINOv2, else by the base's
        own network."""
        if embeddings.dino:
            return self._character(embeddings.dino.parts).to(self.device)
        return self._base_parts(pictures[: len(self.prompts.character)], side, encoder)

    def _base_parts(self, images: Sequence[Image.Image], side: int, encoder: Encoder) -> Tensor:
        with lora_attached(encoder.base, None):
            return base_parts(images, side, encoder).to(self.device)

    @property
    def _references(self) -> ReferenceEmbeddings:
        """DINOv2 tells subjects of a class better apart than CLIP, which represents what captions say."""
        return self.dino or self.clip

    def _whole(self, embeddings: Embeddings) -> Tensor:
        return embeddings.dino.whole if embeddings.dino else embeddings.clip

    def _character(self, whole: Tensor) -> Tensor:
        """Those of images with the trigger."""
        return whole[: len(self.prompts.character)]

    def _others(self, whole: Tensor) -> Tensor:
        """Those of images without the trigger."""
        return whole[len(self.prompts.character) :]

    def _scored(
        self,
        lora: Path | None,
        pictures: list[Image.Image],
        files: list[Path],
        embeddings: Embeddings,
        captions: list[str | None],
        parts: Tensor,
        photos: Sequence[ScoredPhoto],
    ) -> ScoredImages:
        prompts, baseline = self.prompts, self.baseline
        of_character, of_others, of_seeds = self._measure(embeddings, captions, parts)
        lines = [
            {"lora": lora and str(lora), "prompt": spec.prompt, "seed": spec.seed, "picture": str(file)}
            for spec, file in zip(prompts.specs, files, strict=True)
        ]
        count = len(prompts.character)
        for i, line in enumerate(lines):
            values, index = (of_character | of_seeds, i) if i < count else (of_others, i - count)
            line["caption"] = captions[i] if i < count else None
            line["scores"] = {name: _rounded(numbers[index].item()) for name, numbers in values.items()}
        # Image by image: how much a prompt's background resembles the references' adds no uncertainty about the LoRA.
        gained = {"gained": parts - baseline.parts}
        of_photos = {name: torch.tensor([p.judged.scores[name] for p in photos]) for name in OF_PHOTOS if photos}
        groups = [of_character | of_seeds | gained, of_others, *([of_photos] if photos else [])]
        estimates = metrics.estimates(groups, self._combined)
        scores = {name: estimates[name] for name in ("score", *of_photos, *of_character, *of_others, *of_seeds)}
        return ScoredImages(lora.stem if lora else "without a LoRA", scores, lines, pictures)

    def _measure(
        self, embeddings: Embeddings, captions: list[str | None], parts: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The metrics of images with the trigger, of images without, and of the seeds with the trigger: each (N,)."""
        references, prompts, whole = self._references, self.prompts, self._whole(embeddings)
        character, clip = self._character(whole), self._character(embeddings.clip)
        contrast, contrast_others = self._contrasts(embeddings)
        of_character = {"parts": parts, "subject": metrics.subject(character, references.references)}
        if self.dino:
            of_character["subject_clip"] = metrics.subject(clip, self.clip.references)
        of_character |= {
            "prompt": metrics.prompt(clip, self.texts, prompts.character_texts),
            "contrast": contrast,
            "attributes": self._attributes(captions),
        }
        of_others = {
            "contrast_others": contrast_others,
            "leakage": metrics.leakage(self._others(whole), self.baseline.others),
        }
        of_seeds = {
            "diversity": metrics.diversity(character, prompts.character_texts),
            "memorised": metrics.memorised(character, references.training),
        }
        return of_character, of_others, of_seeds

    def _captions(self, pictures: list[Image.Image]) -> list[str | None]:
        """Captions in the words of the prompts; None for each image where the scores need no captions."""
        if not self.prompts.patterns:
            return [None] * len(pictures)
        captions = caption_images(self.captioner, pictures, self.device)
        return list(run_refiner(self.refiner, captions, self.trigger))

    def _attributes(self, captions: list[str | None]) -> Tensor:
        """The fraction of a prompt's attributes that the caption names (N,), nan where a prompt has none."""
        matches = [
            metrics.attributes(spec.prompt, caption or "", self.prompts.patterns)
            for spec, caption in zip(self.prompts.character, captions, strict=True)
        ]
        return torch.tensor([sum(named) / len(named) if named else math.nan for named in matches])

    def _combined(self, means: Mapping[str, Tensor]) -> Tensor:
        names = ("gained", "contrast", "attributes", "contrast_others")
        score = metrics.combined(*(means[name] for name in names), self.baseline.scale)
        return (score * means["resemblance"]).sqrt() if self.photos else score

    def _contrasts(self, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
        """metrics.contrast of images with the trigger (N,), and of images without (M,)."""
        texts, prompts, clip = self.texts, self.prompts, embeddings.clip
        return (
            metrics.contrast(self._character(clip), texts, prompts.character_texts),
            metrics.contrast(self._others(clip), texts, prompts.other_texts),
        )


@dataclass(frozen=True)
class Scorers:
    """Scores LoRAs of one or several characters, each by its own prompts and images; `score_base` comes first."""

    by_trigger: Mapping[str, Scorer]

    @classmethod
    def load(
        cls,
        score: Score,
        model: Model,
        captioner: Mapping[str, Any],
        refiner: Mapping[str, Any],
        class_noun: str,
        training: Pictures,
        held_out: Pictures,
        device: torch.device,
    ) -> "Scorers":
        """A Scorer of each character in `training`; see Scorer.load. Raises InputError."""
        scorers = {}
        for number, (trigger, images) in enumerate(training.items()):
            prompts = ScorePrompts.of(score, trigger, class_noun, f"{number}-" if len(training) > 1 else "")
            others = held_out.get(trigger, ())
            scorers[trigger] = Scorer.load(prompts, model, captioner, refiner, trigger, images, others, score, device)
        return cls(scorers)

    def score_base(self, render: RenderSettings, folder: Path, encoder: Encoder) -> ScoredImages:
        """Scorer.score_base of every character. Raises RunError for non-finite values."""
        return self._together([scorer.score_base(render, folder, encoder) for scorer in self.by_trigger.values()])

    def score(self, lora: Path, render: RenderSettings, folder: Path, encoder: Encoder) -> ScoredImages:
        """Scorer.score of every character.

        Raises InputError for a file that does not fit, RunError for non-finite values."""
        return self._together([scorer.score(lora, render, folder, encoder) for scorer in self.by_trigger.values()])

    def _together(self, scored: Sequence[ScoredImages]) -> ScoredImages:
        """The means over the characters, and the score of each as score/TRIGGER."""
        if len(scored) == 1:
            return scored[0]
        means = {name: metrics.mean_estimate([each.scores[name] for each in scored]) for name in scored[0].scores}
        own = {f"score/{t}": each.scores["score"] for t, each in zip(self.by_trigger, scored, strict=True)}
        lines = [line for each in scored for line in each.lines]
        pictures = [picture for each in scored for picture in each.pictures]
        return ScoredImages(scored[0].name, {"score": means["score"], **own, **means}, lines, pictures)


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


RECORD = "scores.json"  # beside the images of a LoRA


def save_scored(folder: Path, scored: ScoredImages, key: str) -> Path:
    """Write the scores of a LoRA beside its images in `folder`; `key` is a hash of all that decides them."""
    scores = {name: estimate and asdict(estimate) for name, estimate in scored.scores.items()}
    return write_json(folder / RECORD, {"key": key, "scores": scores, "lines": scored.lines})


def load_scored(folder: Path, lora: Path, key: str) -> ScoredImages | None:
    """What save_scored has written of `lora` under the same `key`; None where that, or one of its images, is missing or
    damaged."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["key"] != key:
            return None
        scores = {name: estimate and Estimate(**estimate) for name, estimate in record["scores"].items()}
        files = [folder / Path(line["picture"]).name for line in record["lines"]]
        lines = [
            line | {"lora": str(lora), "picture": str(file)} for line, file in zip(record["lines"], files, strict=True)
        ]
        return ScoredImages(lora.stem, scores, lines, [open_picture(file) for file in files])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, InputError):
        return None


def write_lines(folder: Path, scored: Sequence[ScoredImages]) -> Path:
    """Write scores.jsonl: one line per image."""
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for images in scored for line in images.lines]
    return write_text(folder / "scores.jsonl", "".join(lines))


def numbers(scores: Scores) -> dict[str, float]:
    """The scores as the tracker logs them."""
    return {f"score/{name}": estimate.value for name, estimate in scores.items() if estimate}


def rows(scored: ScoredImages, rank: int, lr: float, step: int) -> list[dict]:
    """The rows of the tracker's table: one per image, with the same columns in every run."""
    names = list(dict.fromkeys(name for line in scored.lines for name in line["scores"]))
    return [
        {"rank": rank, "lr": lr, "step": step, "prompt": line["prompt"], "seed": line["seed"], "picture": picture}
        | {f"score/{name}": line["scores"].get(name) for name in names}  # one of them is called prompt
        for line, picture in zip(scored.lines, scored.pictures, strict=True)
    ]


def table(scored: Sequence[ScoredImages]) -> str:
    """A line for each LoRA, the best first, under the names of the metrics."""
    names = [name for name in scored[0].scores if any(images.scores[name] for images in scored)]
    rows = [["", "score", "95 % of resamplings", *names[1:]]]
    for images in sorted(scored, key=lambda images: -images.scores["score"].value):
        score, estimates = images.scores["score"], [images.scores[name] for name in names[1:]]
        others = [f"{round(estimate.value, 2) + 0:.2f}" if estimate else "-" for estimate in estimates]
        rows.append([images.name, f"{score.value:.2f}", f"{score.low:.2f} to {score.high:.2f}", *others])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
