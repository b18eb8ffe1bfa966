"""Images and captions as tensors, encoded once; and the batch of any step."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from lora_lab.base.encode import Encoder
from lora_lab.base.load import token_counter
from lora_lab.base.protocol import BaseModel, Conditioning
from lora_lab.captions.syntax import length_warnings, long_texts, prompt_warnings, prompts_by_key, syntax_warnings
from lora_lab.console import say
from lora_lab.images.dataset import Masks, Sample, apply_caption_affixes
from lora_lab.images.pixels import Fitted, aspect_buckets, fit, fit_crops, nearest_bucket, open_picture
from lora_lab.settings.schema import Dataset, Model, Prior, Score, Text, Triggers
from lora_lab.training.loss import Batch, Objective
from lora_lab.training.randomness import batch_indices, choose, sample_randomness, shuffle_caption_tags


@dataclass(frozen=True)
class View:
    """An image as one sample uses it: cropped, perhaps mirrored; on the device."""

    latents: Tensor  # (C, h, w)
    mask: Tensor | None  # (1, h, w), 0 to 1, weights of the latents; None trains on the whole image
    conditioning: Conditioning  # on the image's sizes, without a batch dimension


@dataclass(frozen=True)
class Example:
    """One image: its crops, each upright and, with flipping, mirrored; its captions, each in all tag orders."""

    name: str
    crops: list[list[View]]
    texts: list[list[Conditioning]]  # without a batch dimension


@dataclass(frozen=True)
class TrainingData:
    """All examples, grouped by size; `empty` stands in for a dropped caption."""

    examples: list[Example]
    empty: Conditioning
    buckets: list[list[int]] = field(default_factory=list)

    def batch(
        self,
        *,
        seed: int,
        step: int,
        part: int,
        parts: int,
        batch_size: int,
        objective: Objective,
        caption_dropout: float,
    ) -> Batch:
        """Batch `part` of the `parts` that step `step` accumulates; a function of its arguments alone."""
        examples = [self.examples[i] for i in batch_indices(seed, step * parts + part, self.buckets, batch_size)]
        shape, loss = tuple(examples[0].crops[0][0].latents.shape), objective.settings
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
            noise=_to_device(torch.stack([d.noise for d in draws]), device),
            timesteps=_to_device(timesteps, device),
            conditioning=_stacked(texts) | _stacked([view.conditioning for view in views]),
            loss_weights=_to_device(objective.loss_weights[timesteps], device),
            huber_delta=_to_device(objective.huber_delta[timesteps], device),
            mask=loss.unmasked_weight + (1 - loss.unmasked_weight) * torch.stack(masks) if masks else None,
        )

    def names(self, *, seed: int, step: int, parts: int, batch_size: int) -> list[str]:
        """The names of the images of step `step`."""
        batches = (batch_indices(seed, step * parts + part, self.buckets, batch_size) for part in range(parts))
        return [self.examples[i].name for indices in batches for i in indices]


def _stacked(conditionings: Sequence[Conditioning]) -> Conditioning:
    return {name: torch.stack([values[name] for values in conditionings]) for name in conditionings[0]}


def fit_pictures(samples: list[Sample], resolution: int, step: int, masks: Masks | None) -> list[Fitted]:
    """Every image, resized and cropped at the centre to its bucket, with its mask likewise. `resolution` and `step` are
    model.resolution and model.bucket_step, in pixels.

    Raises InputError for an image that cannot be read; no model is loaded for that."""
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


def crop_pictures(samples: list[Sample], pictures: list[Fitted], masks: Masks | None, count: int) -> list[list[Fitted]]:
    """Up to `count` crops of every image of `fit_pictures`, with its mask cropped likewise. Raises InputError."""
    if count == 1:
        return [[fitted] for fitted in pictures]
    crops = []
    for sample, fitted in zip(samples, pictures, strict=True):
        picture, bucket = open_picture(sample.path), fitted.picture.size
        cuts = fit_crops(picture, bucket, count)
        if masks:
            mask = masks.open(sample.name, sample.path, picture.size)
            mask_cuts = fit_crops(mask, bucket, count, Image.Resampling.BOX)
            cuts = [replace(cut, mask=mask_cut.picture) for cut, mask_cut in zip(cuts, mask_cuts, strict=True)]
        crops.append(cuts)
    return crops


def caption_texts(captions: Sequence[str], settings: Dataset, trigger: str) -> list[list[str]]:
    """Every text that an image with these captions is trained with: for each caption its tag orders."""
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
    """A mask (mode L) as weights (1, height, width) of the latents: the mean over each latent's pixels, 0 to 1."""
    pixels = torch.from_numpy(np.array(mask)).float() / 255
    return interpolate(pixels[None, None], (height, width), mode="area")[0]


def encode_dataset(
    samples: list[Sample], crops: list[list[Fitted]], texts: list[list[list[str]]], flip: bool, encoder: Encoder
) -> TrainingData:
    """Latents and conditioning of the whole dataset on the encoder's device (SDXL at 1024 px: 0.6 MB per image).

    Texts come before images, so that one component at a time has to be on the device. Raises RunError, naming the
    image or text, for non-finite values."""
    start = time.perf_counter()
    encoded, new_texts = encoder.encode_texts([*(text for t in texts for orders in t for text in orders), ""])
    views = [
        (s.name, v) for s, cuts in zip(samples, crops, strict=True) for cut in cuts for v in _views(cut.picture, flip)
    ]
    latents, new_views = encoder.encode_images(views)
    if folder := encoder.cache.folder:
        new = f"{new_views} of {len(latents)} views of pictures"
        if encoder.tokenizers is None:
            new = f"{new_texts} of {len(encoded)} texts and {new}"
        say(f"encoded {new} in {time.perf_counter() - start:.1f} s, the rest was in {folder}")
    device, next_latents = encoder.device, iter(latents)
    conditioning = to_device(encoded, device)
    examples, buckets = [], {}
    for i, (sample, cuts, captions) in enumerate(zip(samples, crops, texts, strict=True)):
        crop_views = [
            _crop_views(cut, [next(next_latents).to(device) for _ in _views(cut.picture, flip)], encoder.base)
            for cut in cuts
        ]
        examples.append(
            Example(sample.name, crop_views, [[conditioning[text] for text in orders] for orders in captions])
        )
        buckets.setdefault(cuts[0].picture.size, []).extend([i] * sample.repeats)
    empty = conditioning[""]
    if encoder.base.zeros_for_empty_text:  # as sampling has it for an empty prompt
        empty = encoder.base.drop_text(empty)
    return TrainingData(examples, empty, [buckets[size] for size in sorted(buckets)])


def to_device(encoded: dict[str, Conditioning], device: torch.device) -> dict[str, Conditioning]:
    """The conditioning of every text, of any shape, on `device`."""
    return {text: {name: value.to(device) for name, value in values.items()} for text, values in encoded.items()}


def _crop_views(cut: Fitted, latents: list[Tensor], base: BaseModel) -> list[View]:
    """The views of one crop, whose `latents` are upright and, with flipping, mirrored."""
    device, size = latents[0].device, latents[0].shape[1:]
    masks = [latent_mask(view, *size).to(device) for view in _views(cut.mask, True)] or [None, None]
    views = []
    for view, mask, corner in zip(latents, masks, [cut.crop_top_left, cut.mirrored_top_left], strict=False):
        sizes = base.size_conditioning(cut.original_size, corner, cut.target_size)
        views.append(View(view, mask, {name: value.to(device) for name, value in sizes.items()}))
    return views  # without flipping one


def _views(picture: Image.Image | None, flip: bool) -> list[Image.Image]:
    """The image and, with `flip`, its mirror image; [] for None."""
    if picture is None:
        return []
    return [picture, ImageOps.mirror(picture)] if flip else [picture]


def count_buckets(pictures: list[Fitted]) -> dict[tuple[int, int], int]:
    """The number of images of each size (width, height) in pixels."""
    counts: dict[tuple[int, int], int] = {}
    for fitted in pictures:
        counts[fitted.picture.size] = counts.get(fitted.picture.size, 0) + 1
    return dict(sorted(counts.items()))


def text_warnings(
    captions: Mapping[str, Sequence[str]],
    prompts: Sequence[str],
    score: Score,
    prior: Prior,
    model: Model,
    text: Text,
    triggers: Triggers,
) -> list[str]:
    """Lines about captions and prompts whose words do nothing, are too many, or lack a trigger, before the base is
    loaded. `captions` are of images by name, `prompts` of validation images."""
    others = {}
    if model.judge is not None:
        others = prompts_by_key(score_prompts=score.prompts, score_other_prompts=score.other_prompts)
    if prior.prompt:
        others["prior.prompt"] = prior.prompt
    count_tokens = token_counter(model.base)
    too_long = long_texts(captions, count_tokens, text.window) if count_tokens else {}
    return [
        *syntax_warnings(captions),
        *length_warnings(too_long, text.window, "the caption of "),
        *prompt_warnings(prompts_by_key(stage_prompts=prompts), triggers, count_tokens, text.window),
        *prompt_warnings(others, triggers, count_tokens, text.window, of_character=False),
    ]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, copied without waiting for the steps that the device has not finished."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
