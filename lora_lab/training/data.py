"""Pictures and captions as tensors, encoded once; and the batch of any step."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from lora_lab.base.encode import Encoder, TextEmbedding, micro_conditioning
from lora_lab.console import say
from lora_lab.dataset import Sample
from lora_lab.errors import InputError
from lora_lab.images.buckets import Fitted, aspect_buckets, fit, nearest_bucket
from lora_lab.images.masks import Masks
from lora_lab.images.pixels import open_picture
from lora_lab.training.loss import Batch, Objective
from lora_lab.training.randomness import draw, pick


@dataclass(frozen=True)
class Example:
    """One picture as training sees it: `latents`[0] upright and, if flipping, [1] mirrored; all on the device."""

    name: str
    latents: list[Tensor]
    masks: list[Tensor]  # (1, height / 8, width / 8), 0 to 1, of the latents; [] learns all of the picture
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
        masks = [e.masks[-1] if d.flip else e.masks[0] for e, d in zip(chosen, draws, strict=True) if e.masks]
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
            mask=loss.unmasked_weight + (1 - loss.unmasked_weight) * torch.stack(masks) if masks else None,
        )

    def names(self, *, seed: int, step: int, parts: int, batch_size: int) -> list[str]:
        """The pictures of step `step`."""
        batches = (pick(seed, step * parts + part, self.buckets, batch_size) for part in range(parts))
        return [self.examples[i].name for pictures in batches for i in pictures]


def fit_pictures(samples: list[Sample], resolution: int, step: int, masks: Masks | None) -> list[Fitted]:
    """Every picture in its bucket, its mask cut as it is.

    Raises InputError at one that cannot be read; nothing heavy is loaded for that."""
    sizes = aspect_buckets(resolution, step)
    fitted = []
    for sample in samples:
        picture = open_picture(sample.path)
        bucket = nearest_bucket(picture.size, sizes)
        fitted.append(fit(picture, bucket))
        if masks:
            mask = masks.open(sample.name, sample.path, picture.size)
            fitted[-1] = replace(fitted[-1], mask=fit(mask, bucket, Image.Resampling.BOX).picture)
    return fitted


def latent_mask(mask: Image.Image, height: int, width: int) -> Tensor:
    """A mask (L) as weights (1, height, width) of the latent pixels: the mean of what each stands for, 0 to 1."""
    pixels = torch.from_numpy(np.array(mask)).float() / 255
    return interpolate(pixels[None, None], (height, width), mode="area")[0]


def encode_dataset(samples: list[Sample], pictures: list[Fitted], flip: bool, encoder: Encoder) -> TrainingData:
    """Latents and text embeddings of the whole dataset on the encoder's device (SDXL at 1024 px: 0.6 MB a picture).

    All captions come first, then all pictures, so that no more than one frozen part has to be on the device."""
    views = [
        (sample.name, view) for sample, f in zip(samples, pictures, strict=True) for view in _views(f.picture, flip)
    ]
    texts, new_texts = encoder.captions([*(sample.caption for sample in samples), ""])
    latents, new_pictures = encoder.pictures(views)
    if folder := encoder.cache.folder:
        made = f"{new_texts} of {len(texts)} texts and {new_pictures} of {len(latents)} views of pictures"
        say(f"encoded {made}, the rest was in {folder}")
    device = encoder.device
    on_device = {caption: _on(text, device) for caption, text in texts.items()}
    examples, buckets, every = [], {}, iter(latents)
    for i, (sample, fitted) in enumerate(zip(samples, pictures, strict=True)):
        mine = [next(every).to(device) for _ in _views(fitted.picture, flip)]
        masks = [latent_mask(view, *mine[0].shape[1:]).to(device) for view in _views(fitted.mask, flip)]
        time_ids = micro_conditioning(fitted.original_size, fitted.crop_top_left, fitted.target_size).to(device)
        examples.append(Example(sample.name, mine, masks, on_device[sample.caption], time_ids))
        buckets.setdefault(fitted.picture.size, []).append(i)
    empty = _on(_empty(texts[""], encoder.pipe.config.force_zeros_for_empty_prompt), device)
    return TrainingData(examples, empty, [buckets[size] for size in sorted(buckets)])


def _views(picture: Image.Image | None, flip: bool) -> list[Image.Image]:
    """The picture and, if flipping, its mirror image; [] of none."""
    if picture is None:
        return []
    return [picture, ImageOps.mirror(picture)] if flip else [picture]


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


def _empty(text: TextEmbedding, zeros: bool) -> TextEmbedding:
    """What inference takes for no prompt: zeros for SDXL, the embedding of "" for bases that say so."""
    return TextEmbedding(torch.zeros_like(text.tokens), torch.zeros_like(text.pooled)) if zeros else text


def _on(text: TextEmbedding, device: torch.device) -> TextEmbedding:
    return TextEmbedding(text.tokens.to(device), text.pooled.to(device))
