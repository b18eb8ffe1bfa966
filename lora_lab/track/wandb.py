"""Weights & Biases: online, or offline into the run folder, and never with a prompt for an API key."""

import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.runs import display_path, fitting, hash_files, hash_text, write_text
from lora_lab.settings.schema import Tracker
from lora_lab.track.base import (
    NO_TRACK,
    Pictures,
    Rows,
    Track,
    first_line,
    log_errors,
    validate_name,
)
from lora_lab.track.media import images_of, table_of

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

INIT_SECONDS = 10  # until a server that does not answer makes the run offline
FINISH_SECONDS = 60  # for the last uploads; without a network the next job of a sweep must not wait longer


PROJECT, LONGEST_TAG = "/\\#?%:", 64  # letters that a project may not hold, characters of a tag
MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")  # of WANDB_MODE


def validate(settings: Tracker) -> None:
    """Raise InputError for names that W&B refuses, in the settings or in its environment variables, which it reads too,
    and for mode=online without an API key."""
    variables = os.environ
    for key, project in (("tracker.project", settings.project), ("WANDB_PROJECT", variables.get("WANDB_PROJECT"))):
        validate_name(key, project, forbidden=PROJECT)
    validate_name("tracker.group", settings.group)
    tags = [("tracker.tags", tag) for tag in settings.tags]
    for key, tag in [*tags, *(("WANDB_TAGS", tag) for tag in variables.get("WANDB_TAGS", "-").split(","))]:
        validate_name(key, tag, longest=LONGEST_TAG)
    mode = variables.get("WANDB_MODE", MODES[0])
    if mode not in MODES:
        raise InputError(f"WANDB_MODE={mode}: it is one of {', '.join(MODES)}")
    if settings.mode == "online":
        _why_offline("online", required=True)


@contextmanager
def open_track(folder: Path, name: str, config: Mapping[str, Any], resume: bool, settings: Tracker) -> Iterator[Track]:
    """Within the context track the run in `folder`."""
    folder, names = folder.resolve(), {"name": fitting(name), **names_of(settings)}
    with _open_run(folder, settings.mode, resume, config=dict(config), **names) as run:
        if run is None:
            yield NO_TRACK
            return
        # A metric of its own, because W&B's step cannot decrease, and a resumed run starts at its checkpoint.
        run.define_metric("global_step")
        for pattern in ("train/*", "validation/*", "score/*"):
            run.define_metric(pattern, step_metric="global_step")
        yield log_errors(
            lambda step, values: run.log({"global_step": step, **values}),
            _image_logger(run),
            _table_logger(run, folder),
        )


def names_of(settings: Tracker) -> dict[str, Any]:
    """What wandb.init is told of the settings."""
    return {"project": settings.project, "group": settings.group, "tags": settings.tags}


def attach(sweep: Path, page: Mapping[str, Path], settings: Tracker) -> None:
    """Log the comparison page of `sweep` as an artifact, in a run of its own in the group of the jobs.

    `page` maps names in the artifact to files. A page that was logged before is not logged again; one that has changed
    becomes the next version, in the same run. W&B copies the files into the folder wandb of `sweep`."""
    record = sweep / "wandb" / "page.sha256"
    content = hash_text("".join(f"{name}\0{hash_files(file)}\n" for name, file in page.items()))
    if record.is_file() and record.read_text(encoding="utf-8").strip() == content:
        return
    # With print, because Hydra's log of the sweep is open and would repeat on the screen what `say` prints.
    names = {"name": "comparison", "job_type": "compare", **names_of(settings)}
    with _open_run(sweep, settings.mode, resume=True, show=print, **names) as run:
        if run is not None:
            import wandb

            artifact = wandb.Artifact(artifact_name(run.group), type="comparison")
            with _files_in(sweep):
                for name, file in page.items():
                    artifact.add_file(str(file), name, skip_cache=True)
            run.log_artifact(artifact)
            run.log({"comparison": wandb.Image(str(page["comparison.png"]))})
            write_text(record, content + "\n")


def artifact_name(group: str) -> str:
    """The name of the page of a sweep, whose jobs are `group`, as W&B accepts it."""
    return fitting("comparison-" + re.sub(f"[{re.escape(PROJECT)}]", "-", group))


@contextmanager
def _open_run(
    folder: Path, mode: str, resume: bool, show: Callable[[str], None] = say, **arguments: Any
) -> "Iterator[wandb.Run | None]":
    """Within the context a W&B run for `folder` is open, with `resume` the earlier one. None if it cannot be opened.

    An exception in the context marks the run as failed."""
    record = folder / "wandb" / "run_id"
    run_id = record.read_text(encoding="utf-8").strip() if resume and record.is_file() else None
    with _files_in(folder):
        run = _start_run(mode, show, dir=folder, id=run_id, resume="allow" if run_id else None, **arguments)
    if run is None:
        yield None
        return
    write_text(record, run.id + "\n")
    exit_code = 1
    try:
        yield run
        exit_code = 0
    finally:
        _close_run(run, exit_code)


def _image_logger(run: "wandb.Run") -> Callable[[int, Pictures], None]:
    import wandb

    def images(step: int, pictures: Pictures) -> None:
        run.log({"global_step": step, **images_of(wandb, pictures)})

    return images


def _table_logger(run: "wandb.Run", folder: Path) -> Callable[[int, Rows], None]:
    import wandb

    def table(step: int, rows: Rows) -> None:
        with _files_in(folder):  # W&B makes an artifact of a table's images
            run.log({"global_step": step, "pictures": table_of(wandb, rows)})

    return table


def _start_run(mode: str, show: Callable[[str], None], **arguments: Any) -> "wandb.Run | None":
    """Start a W&B run, online if `mode` allows it and the server answers, else offline; None if both fail.

    Never prompts. Raises InputError for `mode="online"` without an API key."""
    # W&B's reports about itself hold the end of the process for a minute where a server answers byte by byte.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    try:
        preset = wandb.setup(wandb.Settings(silent=True)).settings.mode  # from WANDB_MODE or `wandb offline`
    except Exception as error:  # a variable or a settings file that W&B refuses
        log.warning("tracking could not be started, the run continues without it: %s", " ".join(str(error).split()))
        return None
    if mode == "auto" and preset == "disabled":
        return None
    reason = _why_offline(preset if mode == "auto" else mode, required=mode == "online")
    arguments["reinit"] = "create_new"  # never write into a run that a notebook has open
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
            show(f"tracking: {run.url}")
            return run
        except Exception as error:  # CommError, AuthenticationError, a refused key, an unknown entity, ...
            reason = f"no connection: {first_line(error)}"
    try:
        run = wandb.init(mode="offline", **arguments)
    except Exception as error:
        log.warning("tracking could not be started, the run continues without it: %s", first_line(error))
        return None
    show(f"tracking offline ({reason}); to upload: {_sync(run)}")
    return run


def _close_run(run: "wandb.Run", exit_code: int) -> None:
    import wandb

    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        log.warning("tracking could not be closed (%s); to upload the rest: %s", first_line(error), _sync(run))
        with suppress(Exception):  # else a dead service breaks the tracking of the next job
            wandb.teardown(exit_code=exit_code)


def _why_offline(mode: str, required: bool) -> str:
    """Why a run must be offline; empty if the environment, .netrc or W&B's settings have credentials.

    Neither prompts nor contacts the server. Raises InputError if being online is `required` and there are none."""
    import wandb

    if mode != "online":
        return "as configured"
    wandb.setup(wandb.Settings(silent=True))
    try:
        reason = "" if wandb.login(prompt=False, verify=False) else "no W&B API key"
    except wandb.Error as error:  # a key of the wrong length
        reason = first_line(error)
    if required and reason:
        raise InputError(f"tracker.mode=online: {reason}; run `wandb login`, or set tracker.mode=auto")
    return reason


def _sync(run: "wandb.Run") -> str:
    return shlex.join(["wandb", "sync", str(display_path(Path(run.sync_dir)))])


@contextmanager
def _files_in(folder: Path) -> Iterator[None]:
    """Within the context W&B's cache, data and artifacts are in the run folder, unless the user set other folders.

    Only while W&B reads these variables, because several runs may be open in one process. W&B's settings stay where
    `wandb login` wrote them. Jobs of one process share W&B's service, and with it the cache (in practice a log) of the
    first job."""
    folders = {f"WANDB_{kind}_DIR": folder / "wandb" / kind.lower() for kind in ("CACHE", "DATA", "ARTIFACT")}
    missing = [name for name in folders if name not in os.environ]
    os.environ |= {name: str(folders[name]) for name in missing}
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
