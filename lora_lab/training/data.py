"""Pictures and captions as tensors, encoded once; and the batch of any step."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from lora_lab.base.encode import Encoder, TextEmbedding, TextIds, micro_conditioning
from lora_lab.console import say
from lora_lab.images.buckets import Fitted, aspect_buckets, fit, fit_crops, nearest_bucket
from lora_lab.images.dataset import Sample, apply_caption_affixes, require_trigger
from lora_lab.images.masks import Masks
from lora_lab.images.pixels import open_picture
from lora_lab.settings.schema import Dataset
from lora_lab.training.loss import Batch, Objective
from lora_lab.training.randomness import batch_indices, choose, sample_randomness, shuffle_caption_tags


@dataclass(frozen=True)
class View:
    """A picture as one sample sees it: cut, perhaps mirrored; on the device."""

    latents: Tensor
    mask: Tensor | None  # (1, height / 8, width / 8), 0 to 1, of the latents; None learns all of the picture
    time_ids: Tensor


@dataclass(frozen=True)
class Example:
    """One picture: its crops, each upright and, if flipping, mirrored; its captions, each in all its orders."""

    name: str
    crops: list[list[View]]
    texts: list[list[TextEmbedding]] | list[list[TextIds]]


@dataclass(frozen=True)
class TrainingData:
    """All examples, grouped by size; `empty` stands in for a dropped caption."""

    examples: list[Example]
    empty: TextEmbedding | TextIds
    buckets: list[list[int]] = field(default_factory=list)

    def batch(
        self, *, seed: int, step: int, part: int, parts: int, batch_size: int, asked: Objective, caption_dropout: float
    ) -> Batch:
        """Batch `part` of the `parts` that step `step` accumulates; a function of its arguments alone."""
        pictures = batch_indices(seed, step * parts + part, self.buckets, batch_size)
        examples = [self.examples[i] for i in pictures]
        shape, loss = tuple(examples[0].crops[0][0].latents.shape), asked.settings
        draws = [
            sample_randomness(seed, step, part * batch_size + i, shape, loss, caption_dropout)
            for i in range(batch_size)
        ]
        views = [choose(d.crop, e.crops)[-1 if d.flip else 0] for e, d in zip(examples, draws, strict=True)]
        masks = [view.mask for view in views if view.mask is not None]
        texts = [
            self.empty if d.drop_caption else choose(d.order, choose(d.caption, e.texts))
            for e, d in zip(examples, draws, strict=True)
        ]
        timesteps = torch.tensor([d.timestep for d in draws])
        device = views[0].latents.device
        return Batch(
            latents=torch.stack([view.latents for view in views]),
            noise=_sent(torch.stack([d.noise for d in draws]), device),
            timesteps=_sent(timesteps, device),
            **{name: torch.stack([vars(text)[name] for text in texts]) for name in vars(texts[0])},
            time_ids=torch.stack([view.time_ids for view in views]),
            weights=_sent(asked.weights[timesteps], device),
            huber_delta=_sent(asked.huber_delta[timesteps], device),
            mask=loss.unmasked_weight + (1 - loss.unmasked_weight) * torch.stack(masks) if masks else None,
        )

    def names(self, *, seed: int, step: int, parts: int, batch_size: int) -> list[str]:
        """The pictures of step `step`."""
        batches = (batch_indices(seed, step * parts + part, self.buckets, batch_size) for part in range(parts))
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


def crop_pictures(samples: list[Sample], pictures: list[Fitted], masks: Masks | None, most: int) -> list[list[Fitted]]:
    """Of every picture of `fit_pictures` up to `most` crops, its mask cut as each."""
    if most == 1:
        return [[fitted] for fitted in pictures]
    crops = []
    for sample, fitted in zip(samples, pictures, strict=True):
        picture, bucket = open_picture(sample.path), fitted.picture.size
        cuts = fit_crops(picture, bucket, most)
        if masks:
            mask = masks.open(sample.name, sample.path, picture.size)
            same = fit_crops(mask, bucket, most, Image.Resampling.BOX)
            cuts = [replace(cut, mask=other.picture) for cut, other in zip(cuts, same, strict=True)]
        crops.append(cuts)
    return crops


def caption_texts(captions: Sequence[str], settings: Dataset, trigger: str) -> list[list[str]]:
    """Every text that a picture of these captions is trained with: of each caption its orders."""
    return [
        [
            apply_caption_affixes(order, settings.caption_prefix, settings.caption_suffix, trigger)
            for order in (
                shuffle_caption_tags(caption, settings.keep_tokens, settings.caption_variants)
                if settings.shuffle_captions
                else [caption]
            )
        ]
        for caption in captions
    ]


def latent_mask(mask: Image.Image, height: int, width: int) -> Tensor:
    """A mask (L) as weights (1, height, width) of the latent pixels: the mean of what each stands for, 0 to 1."""
    pixels = torch.from_numpy(np.array(mask)).float() / 255
    return interpolate(pixels[None, None], (height, width), mode="area")[0]


def encode_dataset(
    samples: list[Sample], crops: list[list[Fitted]], texts: list[list[list[str]]], flip: bool, encoder: Encoder
) -> TrainingData:
    """Latents and text embeddings of the whole dataset on the encoder's device (SDXL at 1024 px: 0.6 MB a picture).

    All texts come first, then all pictures, so that no more than one frozen part has to be on the device."""
    began = time.perf_counter()
    embedded, new_texts = encoder.captions([*(text for t in texts for orders in t for text in orders), ""])
    views = [
        (s.name, v) for s, cuts in zip(samples, crops, strict=True) for cut in cuts for v in _views(cut.picture, flip)
    ]
    latents, new_views = encoder.pictures(views)
    if folder := encoder.cache.folder:
        made = f"{new_views} of {len(latents)} views of pictures"
        if encoder.tokenizers is None:
            made = f"{new_texts} of {len(embedded)} texts and {made}"
        say(f"encoded {made} in {time.perf_counter() - began:.1f} s, the rest was in {folder}")
    device, every = encoder.device, iter(latents)
    here = {text: embedding.to(device) for text, embedding in embedded.items()}
    examples, buckets = [], {}
    for i, (sample, cuts, its_texts) in enumerate(zip(samples, crops, texts, strict=True)):
        seen = [_seen(cut, [next(every).to(device) for _ in _views(cut.picture, flip)]) for cut in cuts]
        examples.append(Example(sample.name, seen, [[here[text] for text in orders] for orders in its_texts]))
        buckets.setdefault(cuts[0].picture.size, []).extend([i] * sample.repeats)
    empty = here[""]
    if encoder.pipe.config.force_zeros_for_empty_prompt:  # what inference takes for no prompt: of SDXL zeros
        empty = empty.left_out()
    return TrainingData(examples, empty, [buckets[size] for size in sorted(buckets)])


def _seen(cut: Fitted, latents: list[Tensor]) -> list[View]:
    """The views of one crop, whose latents are upright and, if flipping, mirrored."""
    device, size = latents[0].device, latents[0].shape[1:]
    masks = [latent_mask(view, *size).to(device) for view in _views(cut.mask, True)] or [None, None]
    places = [cut.crop_top_left, cut.mirrored_top_left]
    time_ids = [micro_conditioning(cut.original_size, place, cut.target_size).to(device) for place in places]
    return [View(*view) for view in zip(latents, masks, time_ids, strict=False)]  # no second one without flipping


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


def check_trigger(texts: list[list[list[str]]], trigger: str) -> None:
    """Raise InputError if none of the texts that images are trained with has the trigger."""
    require_trigger([[text for orders in image_texts for text in orders] for image_texts in texts], trigger)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On `device`, without waiting for the steps that it has not done yet: it fetches the numbers itself."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
