"""Settings of what is trained on: the dataset, and the class images that preserve the base's prior."""

from dataclasses import dataclass
from typing import Literal

from lora_lab.errors import InputError
from lora_lab.settings.setting import DatasetRoot, FolderPath, Section, section, setting


@dataclass(frozen=True)
class Folder:
    """A folder of the dataset, whose pictures an epoch shows `repeats` times."""

    root: str | None
    repeats: int


@section
class Dataset(Section):
    root: DatasetRoot = setting(
        "folder of images with captions; for training also a list of folders and of {root, repeats}",
        decides="weights",
        hashed_as="dataset",
        default=None,
    )
    repeats: int = setting(
        "times that an epoch shows an image, in folders that do not set their own", decides="weights", default=1, ge=1
    )
    flip: bool = setting("also train on mirrored images", decides="weights", default=False)
    random_crop: bool = setting(
        "crop an image that is longer than its bucket at a random offset, not at the centre",
        decides="weights",
        default=False,
    )
    crops: int = setting(
        "of random_crop: offsets, evenly spaced; each is another latent to encode and cache",
        decides="weights",
        default=4,
        ge=2,
    )
    shuffle_captions: bool = setting(
        "put the comma-separated phrases of a caption in a random order", decides="weights", default=False
    )
    keep_tokens: int = setting("of shuffle_captions: phrases that stay in front", decides="weights", default=1, ge=0)
    caption_variants: int = setting(
        "of shuffle_captions: orders of a caption; each is another text to encode and cache",
        decides="weights",
        default=8,
        ge=2,
    )
    caption_prefix: str = setting("text before every caption; {trigger} is replaced", decides="weights", default="")
    caption_suffix: str = setting("text after every caption; {trigger} is replaced", decides="weights", default="")

    def __post_init__(self) -> None:
        for folder in self.folders:
            if folder.repeats < 1:
                raise InputError(f"dataset.root={folder.root}: repeats={folder.repeats}: repeats must be at least 1")

    @property
    def folders(self) -> list[Folder]:
        """The folders of training. Raises InputError for a list of something else."""
        if not isinstance(self.root, list):
            return [self._folder(self.root)]
        if not self.root:
            raise InputError("dataset.root=[]: name at least one folder")
        return [self._folder(entry) for entry in self.root]

    @property
    def folder(self) -> str | None:
        """The folder of a stage that reads only one. Raises InputError where several are named."""
        if len(self.folders) > 1:
            raise InputError("dataset.root: several folders are for stage=train, name one of them here")
        return self.folders[0].root

    def _folder(self, entry: object) -> Folder:
        if isinstance(entry, dict) and "root" in entry and set(entry) <= {"root", "repeats"}:
            repeats = entry.get("repeats", self.repeats)
            if type(repeats) is int and isinstance(entry["root"], (str, int, float)):
                return Folder(str(entry["root"]), repeats)
        elif entry is None and entry is self.root:
            return Folder(None, self.repeats)
        elif isinstance(entry, (str, int, float)):  # a folder may be called 2026
            return Folder(str(entry), self.repeats)
        raise InputError(f"dataset.root: {entry} is no folder, write a name or {{root: FOLDER, repeats: 2}}")


KEYS_OF_PRIORS = {
    "none": (),
    "pictures": ("weight", "root", "prompt"),
    "generated": ("weight", "prompt", "number", "seed"),
    "prediction": ("weight", "class_noun"),
}


@section
class Prior(Section):
    kind: Literal["none", "pictures", "generated", "prediction"] = setting(
        "how the base's idea of the class is preserved", decides="weights", default="none"
    )
    weight: float | None = setting(
        "weight of the loss of the prior; the loss of the character has weight 1", decides="weights", default=None, ge=0
    )
    root: FolderPath | None = setting(
        "of prior=pictures: folder of class images, with captions unless prior.prompt is the caption of all",
        decides="weights",
        hashed_as="prior",
        default=None,
    )
    prompt: str | None = setting(
        "of prior=pictures: caption of all class images, null reads theirs; of prior=generated: the prompt they are "
        "drawn with",
        decides="weights",
        default=None,
    )
    number: int | None = setting("of prior=generated: class images", decides="weights", default=None, ge=1)
    seed: int | None = setting(
        "of prior=generated: seed of the class images; runs with the same settings share them",
        decides="weights",
        default=None,
        ge=0,
    )
    class_noun: str | None = setting(
        "of prior=prediction: the noun that replaces the trigger in captions", decides="weights", default=None
    )

    def __post_init__(self) -> None:
        allowed = KEYS_OF_PRIORS[self.kind]
        for key in ("weight", "root", "prompt", "number", "seed", "class_noun"):
            value = getattr(self, key)
            missing = value is None or (isinstance(value, str) and not value.strip())
            if key in allowed and missing and (self.kind, key, value) != ("pictures", "prompt", None):
                raise InputError(f"prior.{key} is missing: prior={self.kind} needs it, set prior.{key}=...")
            if key not in allowed and value is not None:
                kinds = " or ".join(f"prior={kind}" for kind, keys in KEYS_OF_PRIORS.items() if key in keys)
                raise InputError(f"prior.{key}={value}: {key} belongs to {kinds}, set that too")
