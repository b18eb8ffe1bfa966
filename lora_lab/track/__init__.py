"""Experiment trackers (W&B, trackio, TensorBoard, none) behind three functions: numbers, images, table."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lora_lab.errors import InputError
from lora_lab.track import tensorboard, trackio, wandb
from lora_lab.track.base import NO_TRACK, Track

KINDS = ("wandb", "trackio", "tensorboard", "off")
EXTRAS = ("trackio", "tensorboard")  # optional; package and extra have the name of the kind


def refuse_missing(kind: str) -> None:
    """Raise InputError for an unknown kind of tracker, or one whose package is not installed."""
    if kind not in KINDS:
        raise InputError(f"tracker.kind={kind}: kind is one of {', '.join(KINDS)}")
    if kind in EXTRAS and find_spec(kind) is None:
        raise InputError(f'tracker={kind} needs a package: pip install "lora_lab[{kind}]"')


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
    `resume` the tracked run of `folder` is continued. Raises InputError for an unknown kind, a missing package, or
    `mode="online"` without an API key."""
    refuse_missing(kind)
    if kind == "wandb":
        names = {"name": name, "project": project, "group": group, "tags": list(tags)}
        tracker = wandb.open_track(folder.resolve(), config, mode, resume, names)
    elif kind == "trackio":
        tracker = trackio.open_track(folder, name, config, resume, project=project, group=group)
    elif kind == "tensorboard":
        tracker = tensorboard.open_track(folder, {"name": name, **config}, resume)
    else:
        tracker = nullcontext(NO_TRACK)
    with tracker as track:
        yield track
