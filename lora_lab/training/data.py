"""Pictures and captions as tensors, encoded once; and the batch of any step."""

from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import ImageOps
from torch import Tensor

from lora_lab.base.encode import TextEmbedding, encode_caption, encode_picture, micro_conditioning
from lora_lab.console import bar
from lora_lab.dataset import Sample
from lora_lab.errors import InputError
from lora_lab.images.buckets import Fitted, aspect_buckets, fit, nearest_bucket
from lora_lab.images.pixels import open_picture
from lora_lab.training.loss import Batch, Objective
from lora_lab.training.randomness import draw, pick


@dataclass(frozen=True)
class Example:
    """One picture as training sees it: `latents`[0] upright and, if flipping, [1] mirrored; all on the device."""

    latents: list[Tensor]
    text: TextEmbedding
    time_ids: Tensor


@dataclass(frozen=True)
class TrainingData:
    """All examples, grouped by size; `empty` stands in for a dropped caption."""

    examples: list[Example]
    empty: TextEmbedding
    buckets: list[list[int]] = field(default_factory=list)

    def batch(
        self, *, seed: int, step: int, part: int, parts: int, batch_size: int, asked: Objective, caption_dropout: float
    ) -> Batch:
        """Batch `part` of the `parts` that step `step` accumulates; a function of its arguments alone."""
        pictures = pick(seed, step * parts + part, self.buckets, batch_size)
        chosen = [self.examples[i] for i in pictures]
        shape, loss = tuple(chosen[0].latents[0].shape), asked.settings
        draws = [draw(seed, step, part * batch_size + i, shape, loss, caption_dropout) for i in range(batch_size)]
        latents = [e.latents[-1] if d.flip else e.latents[0] for e, d in zip(chosen, draws, strict=True)]
        texts = [self.empty if d.drop_caption else e.text for e, d in zip(chosen, draws, strict=True)]
        timesteps = torch.tensor([d.timestep for d in draws])
        device = latents[0].device
        return Batch(
            latents=torch.stack(latents),
            noise=torch.stack([d.noise for d in draws]).to(device),
            timesteps=timesteps.to(device),
            tokens=torch.stack([t.tokens for t in texts]),
            pooled=torch.stack([t.pooled for t in texts]),
            time_ids=torch.stack([e.time_ids for e in chosen]),
            weights=asked.weights[timesteps].to(device),
            huber_c=asked.huber_c[timesteps].to(device),
        )


def fit_pictures(samples: list[Sample], resolution: int, step: int) -> list[Fitted]:
    """Every picture in its bucket. Raises InputError at one that cannot be read; nothing heavy is loaded for that."""
    sizes = aspect_buckets(resolution, step)
    fitted = []
    for sample in samples:
        picture = open_picture(sample.path)
        fitted.append(fit(picture, nearest_bucket(picture.size, sizes)))
    return fitted


def encode_dataset(
    pipe: StableDiffusionXLPipeline, samples: list[Sample], pictures: list[Fitted], flip: bool, device: torch.device
) -> TrainingData:
    """Latents and text embeddings of the whole dataset (SDXL at 1024 px: 0.6 MB a picture in all)."""
    texts: dict[str, TextEmbedding] = {}
    examples, buckets = [], {}
    for i, (sample, fitted) in enumerate(
        zip(bar(samples, desc="encode", unit="picture", leave=False), pictures, strict=True)
    ):
        if sample.caption not in texts:
            texts[sample.caption] = _on(encode_caption(pipe, sample.caption), device)
        views = [fitted.picture, ImageOps.mirror(fitted.picture)] if flip else [fitted.picture]
        latents = [encode_picture(pipe, view, sample.name).to(device) for view in views]
        time_ids = micro_conditioning(fitted.original_size, fitted.crop_top_left, fitted.target_size).to(device)
        examples.append(Example(latents, texts[sample.caption], time_ids))
        buckets.setdefault(fitted.picture.size, []).append(i)
    return TrainingData(examples, _on(_empty(pipe), device), [buckets[size] for size in sorted(buckets)])


def count_buckets(pictures: list[Fitted]) -> dict[tuple[int, int], int]:
    """How many pictures have which size (width, height)."""
    counts: dict[tuple[int, int], int] = {}
    for fitted in pictures:
        counts[fitted.picture.size] = counts.get(fitted.picture.size, 0) + 1
    return dict(sorted(counts.items()))


def check_trigger(samples: list[Sample], trigger: str) -> None:
    """A trigger that no caption has would be learnt by nothing."""
    if not any(trigger in sample.caption for sample in samples):
        raise InputError(
            f"no caption of the {len(samples)} pictures has the trigger {trigger}: "
            f"run stage=refine to put it in, or name yours with trigger="
        )


def _empty(pipe: StableDiffusionXLPipeline) -> TextEmbedding:
    """What inference takes for no prompt: zeros for SDXL, the embedding of "" for bases that say so."""
    text = encode_caption(pipe, "")
    if pipe.config.force_zeros_for_empty_prompt:
        return TextEmbedding(torch.zeros_like(text.tokens), torch.zeros_like(text.pooled))
    return text


def _on(text: TextEmbedding, device: torch.device) -> TextEmbedding:
    return TextEmbedding(text.tokens.to(device), text.pooled.to(device))
