"""What keeps the base's idea of the class while one of it is learnt: class pictures, or what the base itself predicts.

Without it every character comes to look like the one that is trained on."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_lab.base.encode import Encoder
from lora_lab.settings.schema import Config
from lora_lab.training.class_pictures import draw_missing
from lora_lab.training.data import TrainingData, encode_dataset, fit_pictures
from lora_lab.training.loss import Batch
from lora_lab.training.randomness import seed_of
from lora_lab.training.resolve import ResolvedTraining


@dataclass(frozen=True)
class PriorData:
    """What every step trains on beside the character: as many samples again, of its class."""

    data: TrainingData
    weight: Tensor  # () of their loss, on the device

    def batch(self, *, seed: int, **which) -> Batch:
        """TrainingData.batch by draws of its own: those of the character are what they are without a prior.

        No caption is dropped: what the base draws without one is the character's to change, if anybody's."""
        batch = self.data.batch(seed=seed_of(seed, "prior"), caption_dropout=0.0, **which)
        return replace(batch, mask=None, prior_weight=self.weight)

    def names(self, *, seed: int, **which) -> list[str]:
        return self.data.names(seed=seed_of(seed, "prior"), **which)


def prior_data(config: Config, resolved: ResolvedTraining, data: TrainingData, encoder: Encoder) -> PriorData | None:
    """What `config.prior` asks for, with class pictures drawn where they are missing; nothing wears an adapter yet.

    For prior=prediction it is the character's own `data`, with captions that name the class."""
    if config.prior.kind == "none":
        return None
    if config.prior.kind == "prediction":
        of_class = renamed(data, resolved.files.texts, config.trigger, config.prior.class_noun, encoder)
    else:
        samples, pictures = resolved.files.class_samples, resolved.images.class_images
        if len(pictures) < len(samples):
            draw_missing(samples, config, encoder)
            pictures = fit_pictures(samples, config.model.resolution, config.model.bucket_step, None)
        texts = [[[caption] for caption in sample.captions] for sample in samples]
        of_class = encode_dataset(samples, [[fitted] for fitted in pictures], texts, False, encoder)
    return PriorData(of_class, torch.tensor(config.prior.weight, device=resolved.device))


def renamed(
    data: TrainingData, texts: list[list[list[str]]], trigger: str, noun: str, encoder: Encoder
) -> TrainingData:
    """`data` of `texts` with `noun` in the place of the trigger in every one of them."""
    named = [[[text.replace(trigger, noun) for text in orders] for orders in its] for its in texts]
    embedded, _ = encoder.captions([text for its in named for orders in its for text in orders])
    here = {text: embedding.to(encoder.device) for text, embedding in embedded.items()}
    examples = [
        replace(example, texts=[[here[text] for text in orders] for orders in its])
        for example, its in zip(data.examples, named, strict=True)
    ]
    return replace(data, examples=examples)
