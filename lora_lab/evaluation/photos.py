"""Score LoRAs by the photos of score.photos: what they draw over them in a few steps is judged for resemblance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Encoder
from lora_lab.captions.refiner import Refiner
from lora_lab.evaluation.embedders import caption_images
from lora_lab.evaluation.resemblance import DrawnImage, Resemblance, ResemblanceJudge
from lora_lab.images.pixels import aspect_buckets, open_picture
from lora_lab.runs import distinct_names
from lora_lab.sampling.generate import Request, find_photos, generate, photo_to_request
from lora_lab.settings.schema import Model, Sampler, Score


@dataclass(frozen=True)
class ScoredPhoto:
    """What was drawn over a photo, and how it was judged."""

    name: str  # the photo's, for a file
    photo: Path
    request: Request
    image: Image.Image
    judged: Resemblance


@dataclass
class PhotoScorer:
    """Scores LoRAs of one character on one base; `score_base` comes first."""

    model: Model
    captioner: Mapping[str, Any]  # its settings
    refiner: Refiner
    trigger: str
    steps: int
    paths: Sequence[Path]
    captions: Sequence[str]  # one for each photo
    judge: ResemblanceJudge | None = field(default=None, init=False)

    @classmethod
    def load(
        cls,
        score: Score,
        model: Model,
        captioner: Mapping[str, Any],
        refiner: Refiner,
        trigger: str,
        device: torch.device,
    ) -> "PhotoScorer | None":
        """Caption the photos of score.photos; None without any. The base is not loaded yet.

        Raises InputError for a photo that cannot be opened, and for a captioner that cannot be loaded."""
        if score.photos is None:
            return None
        paths = find_photos(score.photos, "score.photos")
        photos = [open_picture(path) for path in paths]
        captions = caption_images(captioner, photos, device)
        return cls(model, captioner, refiner, trigger, score.photo_steps, paths, captions)

    def score_base(self, references: Sequence[Image.Image], sampler: Sampler, encoder: Encoder) -> list[ScoredPhoto]:
        """Draw with the base alone, judge that, and keep it for comparison; `references` show the character.

        Raises RunError for non-finite values."""
        requests = self._requests()
        images = self._draw(None, requests, sampler, encoder)
        photos = [request.photo for request in requests]
        with lora_attached(encoder.base, None):
            self.judge = ResemblanceJudge.load(
                self.model, self.captioner, self.refiner, self.trigger, references, photos, images, encoder
            )
        return self._judged(requests, images, encoder)

    def score(self, lora: Path, sampler: Sampler, encoder: Encoder) -> list[ScoredPhoto]:
        """Draw with the LoRA file at weight 1 and judge that, after score_base.

        Raises InputError for a file that does not fit, RunError for non-finite values."""
        requests = self._requests()
        return self._judged(requests, self._draw(lora, requests, sampler, encoder), encoder)

    def _requests(self) -> list[Request]:
        """What to draw over each photo; made anew each time, so that no photo stays in memory during a training."""
        buckets = aspect_buckets(self.model.resolution, self.model.bucket_step)
        return [
            photo_to_request(
                open_picture(path), caption, self.refiner, self.trigger, buckets, strength=self.model.strength
            ).request
            for path, caption in zip(self.paths, self.captions, strict=True)
        ]

    def _draw(
        self, lora: Path | None, requests: list[Request], sampler: Sampler, encoder: Encoder
    ) -> list[Image.Image]:
        sampler = replace(sampler, steps=self.steps)
        with lora_attached(encoder.base, lora, fuse=sampler.fuse):
            return list(generate(encoder.base, requests, sampler, encoder))

    def _judged(self, requests: list[Request], images: list[Image.Image], encoder: Encoder) -> list[ScoredPhoto]:
        drawn = [DrawnImage(image, i, requests[i].prompt) for i, image in enumerate(images)]
        with lora_attached(encoder.base, None):
            judged, _ = self.judge.measure(drawn, encoder)
        names = distinct_names(self.paths)
        return [ScoredPhoto(*each) for each in zip(names, self.paths, requests, images, judged, strict=True)]
