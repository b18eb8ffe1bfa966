"""Prior preservation (Ruiz et al. 2022, arXiv 2208.12242): training on class images, or on the base's own predictions,
beside the character. Without it every character of the class comes to look like the one that is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_lab.base.encode import Encoder
from lora_lab.images.buckets import Fitted
from lora_lab.images.dataset import Sample
from lora_lab.sampling.render import RenderSettings
from lora_lab.settings.schema import Model, Prior
from lora_lab.training.class_pictures import draw_missing
from lora_lab.training.data import TrainingData, encode_dataset, fit_pictures, to_device
from lora_lab.training.loss import Batch
from lora_lab.training.randomness import seed_of


@dataclass(frozen=True)
class PriorData:
    """What every step trains on beside the character: as many samples of its class."""

    data: TrainingData
    weight: Tensor  # () of their loss, on the device

    def batch(self, *, seed: int, **arguments) -> Batch:
        """TrainingData.batch with separate randomness: the character's batches are the same without a prior.

        No caption is dropped: what the base renders without a caption may change with the character."""
        batch = self.data.batch(seed=seed_of(seed, "prior"), caption_dropout=0.0, **arguments)
        return replace(batch, mask=None, prior_weight=self.weight)

    def names(self, *, seed: int, **arguments) -> list[str]:
        """The names of the images of a step."""
        return self.data.names(seed=seed_of(seed, "prior"), **arguments)


def prior_data(
    prior: Prior,
    trigger: str,
    data: TrainingData,
    texts: list[list[list[str]]],
    samples: Sequence[Sample],
    pictures: Sequence[Fitted],
    model: Model,
    render: RenderSettings,
    encoder: Encoder,
) -> PriorData | None:
    """What `prior` describes, before an adapter is injected; missing class images are rendered. None for prior=none.

    For prior=prediction it is the character's own `data`, whose `texts` name the class in place of the trigger; else
    the class images `samples`, of which `pictures` are on disk. Raises RunError for non-finite values."""
    if prior.kind == "none":
        return None
    if prior.kind == "prediction":
        class_data = with_class_noun(data, texts, trigger, prior.class_noun, encoder)
    else:
        if len(pictures) < len(samples):
            draw_missing(samples, prior, render, encoder)
            pictures = fit_pictures(list(samples), model.resolution, model.bucket_step, None)
        captions = [[[caption] for caption in sample.captions] for sample in samples]
        class_data = encode_dataset(list(samples), [[fitted] for fitted in pictures], captions, False, encoder)
    return PriorData(class_data, torch.tensor(prior.weight, device=encoder.device))


def with_class_noun(
    data: TrainingData, texts: list[list[list[str]]], trigger: str, noun: str, encoder: Encoder
) -> TrainingData:
    """`data`, whose captions are `texts`, with `noun` in place of the trigger in every one of them. Raises RunError for
    non-finite values."""
    renamed = [[[text.replace(trigger, noun) for text in orders] for orders in captions] for captions in texts]
    encoded, _ = encoder.encode_texts([text for captions in renamed for orders in captions for text in orders])
    conditioning = to_device(encoded, encoder.device)
    examples = [
        replace(example, texts=[[conditioning[text] for text in orders] for orders in captions])
        for example, captions in zip(data.examples, renamed, strict=True)
    ]
    return replace(data, examples=examples)
