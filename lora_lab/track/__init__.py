"""Experiment trackers (W&B, trackio, TensorBoard, none) behind three functions: numbers, images, table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lora_lab.errors import InputError
from lora_lab.settings.schema import Tracker
from lora_lab.track import tensorboard, trackio, wandb
from lora_lab.track.base import NO_TRACK, Track


@dataclass(frozen=True)
class Kind:
    """What `tracker.kind` may name."""

    open: Callable[..., AbstractContextManager[Track]]  # from folder, name, config, resume and the group tracker
    validate: Callable[[Tracker], None] = lambda settings: None  # raises InputError for a setting it does not accept
    optional: bool = False  # its package is not a dependency; package and extra have the name of the kind


KINDS = {
    "wandb": Kind(wandb.open_track, wandb.validate),
    "trackio": Kind(trackio.open_track, trackio.validate, optional=True),
    "tensorboard": Kind(tensorboard.open_track, optional=True),
    "off": Kind(lambda *arguments: nullcontext(NO_TRACK)),
}


def validate(settings: Tracker) -> None:
    """Raise InputError for an unknown kind of tracker, one whose package is not installed, and for a setting that the
    tracker would refuse in the middle of a run."""
    name = settings.kind
    if name not in KINDS:
        raise InputError(f"tracker.kind={name}: kind is one of {', '.join(KINDS)}")
    if KINDS[name].optional and find_spec(name) is None:
        raise InputError(f'tracker={name} needs a package: pip install "lora_lab[{name}]"')
    KINDS[name].validate(settings)


@contextmanager
def tracking(
    kind: str,
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    *,
    project: str | None = None,
    mode: Literal["auto", "online", "offline"] = "auto",
    group: str | None = None,
    tags: Sequence[str] = (),
    resume: bool = False,
) -> Iterator[Track]:
    """Track the run in `folder` within the context; an exception in it marks the run as failed.

    `config` is shown with the run. W&B and trackio use `project` and `group`, W&B alone `mode` and `tags`. With
    `resume` the tracked run of `folder` is continued. Raises InputError as `validate` does."""
    settings = Tracker(kind=kind, project=project, mode=mode, group=group, tags=list(tags))
    validate(settings)
    with KINDS[kind].open(folder, name, config, resume, settings) as track:
        yield track
