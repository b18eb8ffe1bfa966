"""Pictures of a character's class for prior preservation: the user's, or drawn by the base before it is trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lora_lab.base.cache import key_of
from lora_lab.base.encode import Encoder
from lora_lab.base.locate import locate_folder
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.images.dataset import Sample, read_dataset
from lora_lab.images.scan import find_pictures
from lora_lab.runs import hash_files, hash_text, save_picture
from lora_lab.sampling.generate import Request, generate
from lora_lab.sampling.render import base_image_key, image_side
from lora_lab.settings.schema import Config
from lora_lab.training.randomness import seed_of


def class_samples(
    config: Config, folder: Path, base: str, dtype: torch.dtype, character: Sequence[Sample]
) -> list[Sample]:
    """The class pictures with their captions, those still to be drawn included; [] where none are asked for.

    `base` is the hash of the base's files, `character` what the LoRA is to learn. Raises InputError."""
    prior = config.prior
    for key in ("prompt", "class_noun"):
        value = getattr(prior, key)
        if value and config.trigger in value:
            raise InputError(
                f"prior.{key}={value}: the trigger {config.trigger} is the character's own, say what others of its "
                "kind are called, such as character"
            )
    if prior.kind == "pictures":
        samples = _given(config)
        _refuse_the_character(samples, config.trigger, character)
        return samples
    if prior.kind == "generated":
        place = _drawn_folder(config, folder, base, dtype)
        return [Sample(f"{i:05d}.png", place / f"{i:05d}.png", (prior.prompt,)) for i in range(prior.number)]
    return []


def _given(config: Config) -> list[Sample]:
    root, prompt = locate_folder("prior.root", config.prior.root), config.prior.prompt
    pictures = find_pictures(root, "prior.root")
    if prompt is not None:
        return [Sample(name, path, (prompt,)) for name, path in pictures.items()]
    try:
        return read_dataset(root)
    except InputError as error:
        raise InputError(f"prior.root: {error}, or say one caption for all of them with prior.prompt=") from error


def _refuse_the_character(samples: Sequence[Sample], trigger: str, character: Sequence[Sample]) -> None:
    """Class pictures show others."""
    theirs = {sample.path.resolve() for sample in character}
    for sample in samples:
        if sample.path.resolve() in theirs:
            raise InputError(f"prior.root: {sample.path} is in dataset.root too, keep the two in folders of their own")
        if any(trigger in caption for caption in sample.captions):
            raise InputError(
                f"prior.root: the caption of {sample.path} has the trigger {trigger}, but class pictures show others: "
                "take it out"
            )


def _drawn_folder(config: Config, folder: Path, base: str, dtype: torch.dtype) -> Path:
    """Where the base's class pictures lie: a name of all that decides what they show, so that runs find each other's.

    Their number is no part of it: asking for more adds to them. Without a cache they lie in the run `folder`."""
    prior = config.prior
    key = key_of("class pictures", base_image_key(config, base, dtype), prior.prompt, prior.seed, image_side(config))
    return (folder if config.cache is None else Path(config.cache)) / "class" / key


def hash_of(samples: Sequence[Sample], config: Config) -> str:
    """What runs that train on the same class pictures have in common. Of drawn ones it is known before they are."""
    if config.prior.kind == "generated":
        return samples[0].path.parent.name
    captions = "\n".join("\t".join([s.name, *s.captions]) for s in samples)
    return hash_text(hash_files(*(s.path for s in samples)) + captions)


def draw_missing(samples: Sequence[Sample], config: Config, encoder: Encoder) -> None:
    """Let the base, without an adapter, draw those of `samples` that are not on disk.

    Each is saved as it is done, so whoever stops it loses the one being drawn; two runs that draw the same write the
    same."""
    missing, side = [s for s in samples if not s.path.is_file()], image_side(config)
    if not missing:
        return
    requests = [
        Request(s.captions[0], seed_of("class picture", config.prior.seed, s.name), (side, side)) for s in missing
    ]
    say(f"drawing {len(missing)} class pictures into {missing[0].path.parent}, where a run that is stopped leaves them")
    whole = replace(encoder, tokenizers=None)  # nothing of the text has begun to learn
    for sample, request in zip(missing, requests, strict=True):  # one at a time, also where parts take turns
        (picture,) = generate(whole.pipe, [request], config.sampler, whole)
        save_picture(sample.path, picture, {"prompt": request.prompt, "seed": request.seed, "lora": "none"})
