"""Prior preservation (Ruiz et al. 2022, arXiv 2208.12242): training on class images, or on the base's own predictions,
beside the character. Without it every character of the class comes to look like the one that is trained.

Class images are the user's, or rendered by the base before it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_lab.base.encode import Encoder, key_of
from lora_lab.base.locate import locate_folder
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.images.dataset import Sample, read_dataset
from lora_lab.images.pixels import Fitted
from lora_lab.images.scan import find_pictures
from lora_lab.runs import display_path, hash_files, hash_text, save_picture
from lora_lab.sampling.generate import RenderSettings, Request, generate
from lora_lab.settings.schema import Model, Prior, Triggers
from lora_lab.training.data import TrainingData, encode_dataset, fit_pictures, to_device
from lora_lab.training.loss import Batch
from lora_lab.training.randomness import seed_of


def class_samples(
    prior: Prior, triggers: Triggers, character: Sequence[Sample], render: RenderSettings, folder: Path
) -> list[Sample]:
    """The class images with their captions, including those not yet rendered; [] for a prior without class images.

    `character` is what the LoRA is trained on, `folder` the run's. Raises InputError."""
    for key in ("prompt", "class_noun"):
        value = getattr(prior, key)
        trigger = next((trigger for trigger in triggers.all if value and trigger in value), None)
        if trigger:
            raise InputError(
                f"prior.{key}={value}: the trigger {trigger} is the character's name, use a word for the class, such "
                "as character"
            )
    if prior.kind == "pictures":
        samples = _user_samples(prior)
        _refuse_the_character(samples, triggers, character)
        return samples
    if prior.kind == "generated":
        place = _generated_folder(prior, render, folder)
        return [Sample(f"{i:05d}.png", place / f"{i:05d}.png", (prior.prompt,)) for i in range(prior.number)]
    return []  # prior=prediction


def _user_samples(prior: Prior) -> list[Sample]:
    root = locate_folder("prior.root", prior.root)
    pictures = find_pictures(root, "prior.root")
    if prior.prompt is not None:
        return [Sample(name, path, (prior.prompt,)) for name, path in pictures.items()]
    try:
        return read_dataset(root)
    except InputError as error:
        raise InputError(f"prior.root: {error}, or set one caption for all of them with prior.prompt=") from error


def _refuse_the_character(samples: Sequence[Sample], triggers: Triggers, character: Sequence[Sample]) -> None:
    """Raise InputError where class images show the character."""
    paths = {sample.path.resolve() for sample in character}
    for sample in samples:
        if sample.path.resolve() in paths:
            raise InputError(f"prior.root: {sample.path} is in dataset.root too, keep the two in different folders")
        found = [trigger for trigger in triggers.all if any(trigger in caption for caption in sample.captions)]
        if found:
            raise InputError(
                f"prior.root: the caption of {sample.path} has the trigger {found[0]}, but class pictures show others: "
                "take it out"
            )


def _generated_folder(prior: Prior, render: RenderSettings, folder: Path) -> Path:
    """The folder of the base's class images, named by all that decides what they show, so that runs share them.

    Their number is not part of it: a larger one adds to them. Without a cache they lie in the run `folder`."""
    key = key_of("class pictures", render.base_key, prior.prompt, prior.seed, render.side)
    return (render.cache or folder) / "class" / key


def hash_of(samples: Sequence[Sample], prior: Prior) -> str:
    """What runs on the same class images have in common. For generated ones it is known before they are rendered."""
    if prior.kind == "generated":
        return samples[0].path.parent.name
    captions = "\n".join("\t".join([s.name, *s.captions]) for s in samples)
    return hash_text(hash_files(*(s.path for s in samples)) + captions)


def draw_missing(samples: Sequence[Sample], prior: Prior, render: RenderSettings, encoder: Encoder) -> None:
    """Let the base, without an adapter, render those of `samples` that are not on disk.

    Each is saved when it is finished, so an interrupted run loses one image at most; two runs that render the same
    image write the same file. Raises RunError for non-finite values."""
    missing = [sample for sample in samples if not sample.path.is_file()]
    if not missing:
        return
    size = (render.side, render.side)
    requests = [Request(s.captions[0], seed_of("class picture", prior.seed, s.name), size) for s in missing]
    place = display_path(missing[0].path.parent)
    say(f"drawing {len(missing)} class pictures into {place}; an interrupted run leaves them there")
    encoder = replace(encoder, tokenizers=None)  # text encoders are not trained yet
    for sample, request in zip(missing, requests, strict=True):  # one at a time, also with offloading
        (image,) = generate(encoder.base, [request], render.sampler, encoder)
        save_picture(sample.path, image, {"prompt": request.prompt, "seed": request.seed, "lora": "none"})


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
    triggers: Triggers,
    data: TrainingData,
    texts: list[list[list[str]]],
    samples: Sequence[Sample],
    pictures: Sequence[Fitted],
    model: Model,
    render: RenderSettings,
    encoder: Encoder,
) -> PriorData:
    """What `prior` describes, before an adapter is injected; missing class images are rendered.

    For prior=prediction it is the character's own `data`, whose `texts` name the class in place of the triggers; else
    the class images `samples`, of which `pictures` are on disk. Raises RunError for non-finite values."""
    if prior.kind == "prediction":
        class_data = with_class_noun(data, texts, triggers, prior.class_noun, encoder)
    else:
        if len(pictures) < len(samples):
            draw_missing(samples, prior, render, encoder)
            pictures = fit_pictures(list(samples), model.resolution, model.bucket_step, None)
        captions = [[[caption] for caption in sample.captions] for sample in samples]
        class_data = encode_dataset(list(samples), [[fitted] for fitted in pictures], captions, False, encoder)
    return PriorData(class_data, torch.tensor(prior.weight, device=encoder.device))


def with_class_noun(
    data: TrainingData, texts: list[list[list[str]]], triggers: Triggers, noun: str, encoder: Encoder
) -> TrainingData:
    """`data`, whose captions are `texts`, with `noun` in place of every trigger in them. Raises RunError for non-finite
    values."""
    renamed = [[[triggers.replaced(text, noun) for text in orders] for orders in captions] for captions in texts]
    encoded, _ = encoder.encode_texts([text for captions in renamed for orders in captions for text in orders])
    conditioning = to_device(encoded, encoder.device)
    examples = [
        replace(example, texts=[[conditioning[text] for text in orders] for orders in captions])
        for example, captions in zip(data.examples, renamed, strict=True)
    ]
    return replace(data, examples=examples)
