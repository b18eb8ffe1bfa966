"""Settings of what is measured, and where it is shown."""

import re
from typing import Literal

from lora_lab.errors import InputError
from lora_lab.settings.setting import FolderPath, Section, TrackerName, section, setting


@section
class Score(Section):
    prompts: list[str] = setting(
        "drawn with the LoRA; {trigger} is replaced; the first shows the character as most training images do",
        decides="request",
    )
    other_prompts: list[str] = setting(
        "also drawn with the LoRA, and should look as they do without it; {class_noun} is replaced", decides="request"
    )
    seeds: list[int] = setting(
        "one image for each prompt and seed; other_prompts use only the first seed",
        decides="request",
        default_factory=lambda: [0, 1],
    )
    attributes: list[str] = setting(
        "regular expressions: what a caption of the image must repeat of the prompt, with the same words in its "
        "groups; [] checks nothing",
        decides="request",
        default_factory=list,
    )
    held_out: FolderPath | None = setting(
        "folder of images of the character that are not trained on; scores compare with these instead",
        decides="request",
        default=None,
    )

    def __post_init__(self) -> None:
        for key in ("prompts", "other_prompts", "seeds"):
            values = getattr(self, key)
            if not values:
                raise InputError(f"score.{key}=[]: name at least one")
            if len(set(values)) < len(values):
                raise InputError(f"score.{key}: each is drawn once, remove the duplicates")
        for text in self.prompts:
            if "{trigger}" not in text:
                raise InputError(f"score.prompts: {text!r} is without the character, write {{trigger}} in its place")
        for text in self.other_prompts:
            if "{trigger}" in text:
                raise InputError(f"score.other_prompts: {text!r} has the trigger, these are prompts of others")
        for pattern in self.attributes:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"score.attributes: {pattern!r} is no regular expression ({error})") from error


@section
class Tracker(Section):
    kind: TrackerName = setting("wandb, trackio, tensorboard or off", decides="nothing", per_job=True, default="off")
    project: str | None = setting(
        "of wandb and trackio: the page that collects the runs", decides="nothing", per_job=True, default=None
    )
    mode: Literal["auto", "online", "offline"] = setting(
        "of wandb: auto is online with an API key and a connection, else offline; online insists on the key",
        decides="nothing",
        per_job=True,
        default="auto",
    )
    group: str | None = setting(
        "of wandb and trackio: runs of a group are compared; null is the sweep's name",
        decides="nothing",
        per_job=True,
        default=None,
    )
    tags: list[str] = setting("of wandb: words to find runs by", decides="nothing", per_job=True, default_factory=list)
