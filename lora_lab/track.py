"""W&B, TensorBoard or nothing, behind three functions: numbers, images, a table."""

import json
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.runs import as_typed, write_text

if TYPE_CHECKING:
    import wandb
    from PIL.Image import Image

log = logging.getLogger(__name__)

INIT_SECONDS = 10  # for the server to answer; the training waits that long before it goes on offline
FINISH_SECONDS = 60  # for the last uploads; a network that died overnight must not hold up the rest of a sweep

Pictures = Mapping[str, "tuple[Image, str]"]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Track:
    """Where a run's numbers and images go. No function ever raises: a tracker must not cost a training."""

    numbers: Callable[[int, Mapping[str, float]], None]  # step, {"train/loss": 0.1}
    images: Callable[[int, Pictures], None]  # step, {"validation/<prompt id>": (picture, caption)}
    table: Callable[[int, Rows], None]  # step, rows of one set of columns, pictures among them; W&B's alone


NOTHING = Track(lambda step, values: None, lambda step, pictures: None, lambda step, rows: None)


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

    `project`, `mode`, `group` and `tags` are W&B's. With `resume` the W&B run that `folder` belongs to goes on.
    Raises InputError for an unknown kind, a missing package, or `mode="online"` without an API key."""
    if kind == "wandb":
        names = {"name": name, "project": project, "group": group, "tags": list(tags)}
        tracker = _wandb(folder.resolve(), config, mode, resume, names)
    elif kind == "tensorboard":
        tracker = _tensorboard(folder, {"name": name, **config}, resume)
    elif kind == "off":
        tracker = nullcontext(NOTHING)
    else:
        raise InputError(f"tracker.kind={kind}: kind is one of wandb, tensorboard, off")
    with tracker as track:
        yield track


def _forgiving(numbers: Callable[..., None], images: Callable[..., None], table: Callable[..., None]) -> Track:
    warned = False

    def forgive(function: Callable[..., None]) -> Callable[..., None]:
        def call(step: int, values: Mapping[str, Any]) -> None:
            nonlocal warned
            try:
                function(step, values)
            except Exception as error:  # whatever a tracker may raise: a full disk, a dead process, a closed socket
                if not warned:
                    log.warning("tracking failed at step %d, the run goes on: %s", step, _line(error))
                warned = True

        return call

    return Track(forgive(numbers), forgive(images), forgive(table))


# --- Weights & Biases


@contextmanager
def _wandb(folder: Path, config: Mapping[str, Any], mode: str, resume: bool, names: dict[str, Any]) -> Iterator[Track]:
    record = folder / "wandb" / "run_id"
    known = record.read_text(encoding="utf-8").strip() if resume and record.is_file() else None
    with _kept_in(folder):
        run = _open_run(mode, dir=folder, config=dict(config), id=known, resume="allow" if known else None, **names)
        if run is None:
            yield NOTHING
            return
        write_text(record, run.id + "\n")
        # The step is a metric of its own: W&B's counter cannot go back, and a resumed run starts at its checkpoint.
        run.define_metric("global_step")
        for pattern in ("train/*", "validation/*", "score/*"):
            run.define_metric(pattern, step_metric="global_step")
        exit_code = 1
        try:
            yield _forgiving(
                lambda step, values: run.log({"global_step": step, **values}), _image_logger(run), _table_logger(run)
            )
            exit_code = 0
        finally:
            _close_run(run, exit_code)


def _image_logger(run: "wandb.Run") -> Callable[[int, Pictures], None]:
    import wandb

    def images(step: int, pictures: Pictures) -> None:
        media = {key: wandb.Image(picture, caption=caption) for key, (picture, caption) in pictures.items()}
        run.log({"global_step": step, **media})

    return images


def _table_logger(run: "wandb.Run") -> Callable[[int, Rows], None]:
    import wandb
    from PIL.Image import Image

    def table(step: int, rows: Rows) -> None:
        columns = list(rows[0])
        cells = [[wandb.Image(row[c]) if isinstance(row[c], Image) else row[c] for c in columns] for row in rows]
        run.log({"global_step": step, "pictures": wandb.Table(columns=columns, data=cells)})

    return table


def _open_run(mode: str, **arguments: Any) -> "wandb.Run | None":
    """Start a W&B run: online if `mode` allows and the server answers, else offline, else None. Never asks anything."""
    import wandb

    preset = wandb.setup(wandb.Settings(silent=True)).settings.mode  # WANDB_MODE, or what `wandb offline` has set
    if mode == "auto" and preset == "disabled":
        return None
    reason = _why_offline(preset if mode == "auto" else mode, insist=mode == "online")
    arguments["reinit"] = "create_new"  # a run that a notebook has open is not ours to write to
    arguments["settings"] = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    if not reason:
        try:
            run = wandb.init(mode="online", **arguments)
            say(f"tracking: {run.url}")
            return run
        except Exception as error:  # CommError, AuthenticationError, a refused key, an unknown entity, ...
            reason = f"no connection: {_line(error)}"
    try:
        run = wandb.init(mode="offline", **arguments)
    except Exception as error:
        log.warning("tracking could not be started, the run goes on without it: %s", _line(error))
        return None
    say(f"tracking offline ({reason}); to upload: {_sync(run)}")
    return run


def _close_run(run: "wandb.Run", exit_code: int) -> None:
    import wandb

    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        log.warning("tracking could not be closed (%s); to upload the rest: %s", _line(error), _sync(run))
        with suppress(Exception):  # a dead service would take the next job's tracking with it
            wandb.teardown(exit_code=exit_code)


def _why_offline(mode: str, insist: bool) -> str:
    """Empty if a run may go online: there are credentials in the environment, in .netrc or in W&B's settings.

    Sends and asks nothing. Raises InputError if the user insists and there are none."""
    import wandb

    if mode != "online":
        return "as asked"
    try:
        reason = "" if wandb.login(prompt=False, verify=False) else "no W&B API key"
    except wandb.Error as error:  # a key of the wrong length
        reason = _line(error)
    if insist and reason:
        raise InputError(f"tracker.mode=online: {reason}; type `wandb login`, or leave the mode at auto")
    return reason


def _sync(run: "wandb.Run") -> str:
    return shlex.join(["wandb", "sync", str(as_typed(Path(run.sync_dir)))])


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Point W&B's cache, data and artifacts into the run folder, unless the user points them elsewhere.

    Its settings stay where `wandb login` wrote them. Jobs of one process share W&B's service, and with it the cache
    (a log, in practice) of the first."""
    names = {f"WANDB_{kind}_DIR": folder / "wandb" / kind.lower() for kind in ("CACHE", "DATA", "ARTIFACT")}
    missing = [name for name in names if name not in os.environ]
    os.environ |= {name: str(names[name]) for name in missing}
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- TensorBoard


@contextmanager
def _tensorboard(folder: Path, config: Mapping[str, Any], resume: bool) -> Iterator[Track]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError('tracker=tensorboard needs a package: pip install "lora_lab[tensorboard]"') from error
    import numpy as np

    writers: list[SummaryWriter] = []

    def writer(step: int) -> SummaryWriter:
        if not writers:  # opened at the first step: a resumed run hides what the killed one wrote from that step on
            writers.append(SummaryWriter(folder / "tensorboard", purge_step=step if resume else None))
            text = json.dumps(config, ensure_ascii=False, indent=2, default=str)
            writers[0].add_text("config", f"```json\n{text}\n```", step)
        return writers[0]

    def numbers(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer(step).add_scalar(key, value, step)

    def images(step: int, pictures: Pictures) -> None:
        for key, (picture, caption) in pictures.items():
            writer(step).add_image(key, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            writer(step).add_text(f"{key}/caption", caption, step)
        writer(step).flush()  # two minutes otherwise: too long for a person who waits for a picture

    try:
        yield _forgiving(numbers, images, lambda step, rows: None)
    finally:
        for opened in writers:
            try:
                opened.close()
            except Exception as error:
                log.warning("tracking could not be closed: %s", _line(error))
