"""W&B, trackio, TensorBoard or nothing, behind three functions: numbers, images, a table."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lora_lab.errors import InputError
from lora_lab.track import tensorboard, trackio, wandb
from lora_lab.track.base import NOTHING, Track

KINDS = ("wandb", "trackio", "tensorboard", "off")
EXTRAS = ("trackio", "tensorboard")  # the package and the extra that brings it are called as the kind


def refuse_missing(kind: str) -> None:
    """Raise InputError for an unknown kind, or one whose package is not installed."""
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
    """Track the run in `folder` until the block ends; an exception in the block marks the run as failed.

    `project` and `group` are W&B's and trackio's, `mode` and `tags` W&B's alone. With `resume` the run that `folder`
    belongs to goes on. Raises InputError for an unknown kind, a missing package, or `mode="online"` without an API
    key."""
    refuse_missing(kind)
    if kind == "wandb":
        names = {"name": name, "project": project, "group": group, "tags": list(tags)}
        tracker = wandb.tracked(folder.resolve(), config, mode, resume, names)
    elif kind == "trackio":
        tracker = trackio.tracked(folder, name, config, resume, project=project, group=group)
    elif kind == "tensorboard":
        tracker = tensorboard.tracked(folder, {"name": name, **config}, resume)
    else:
        tracker = nullcontext(NOTHING)
    with tracker as track:
        yield track
