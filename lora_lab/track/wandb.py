"""Weights & Biases: online, or offline into the run folder. Nothing here ever asks for a key."""

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.runs import display_path, hash_files, hash_text, write_text
from lora_lab.track.base import NOTHING, Pictures, Rows, Track, forgiving, line
from lora_lab.track.media import pictures_of, table_of

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

INIT_SECONDS = 10  # for the server to answer; the training waits that long before it goes on offline
FINISH_SECONDS = 60  # for the last uploads; a network that died overnight must not hold up the rest of a sweep


@contextmanager
def tracked(
    folder: Path, config: Mapping[str, Any], mode: str, resume: bool, names: Mapping[str, Any]
) -> Iterator[Track]:
    """Track the run in `folder`, under `names` (name, project, group, tags)."""
    with _opened(folder, mode, resume, config=dict(config), **names) as run:
        if run is None:
            yield NOTHING
            return
        # The step is a metric of its own: W&B's counter cannot go back, and a resumed run starts at its checkpoint.
        run.define_metric("global_step")
        for pattern in ("train/*", "validation/*", "score/*"):
            run.define_metric(pattern, step_metric="global_step")
        yield forgiving(
            lambda step, values: run.log({"global_step": step, **values}),
            _image_logger(run),
            _table_logger(run, folder),
        )


def attach(sweep: Path, page: Mapping[str, Path], mode: str, names: Mapping[str, Any]) -> None:
    """Log the comparison page of `sweep` as an artifact, in a run of its own beside those of the jobs.

    `page` has its files by their names in the artifact. Of a page that is logged already nothing is done; one that has
    changed is the next version, in the same run. W&B copies the files into `sweep`/wandb."""
    record = sweep / "wandb" / "page.sha256"
    content = hash_text("".join(f"{name}\0{hash_files(file)}\n" for name, file in page.items()))
    if record.is_file() and record.read_text(encoding="utf-8").strip() == content:
        return
    # By print: where Hydra's log of the sweep is still open it would say what `say` says once more.
    with _opened(sweep, mode, resume=True, tell=print, name="comparison", job_type="compare", **names) as run:
        if run is not None:
            import wandb

            artifact = wandb.Artifact(f"comparison-{run.group}".replace("/", "-")[:128], type="comparison")
            with _kept_in(sweep):
                for name, file in page.items():
                    artifact.add_file(str(file), name, skip_cache=True)
            run.log_artifact(artifact)
            run.log({"comparison": wandb.Image(str(page["comparison.png"]))})
            write_text(record, content + "\n")


@contextmanager
def _opened(
    folder: Path, mode: str, resume: bool, tell: Callable[[str], None] = say, **arguments: Any
) -> "Iterator[wandb.Run | None]":
    """The W&B run of `folder`: with `resume` the one it has. None where there cannot be one.

    An exception in the block marks it as failed."""
    record = folder / "wandb" / "run_id"
    known = record.read_text(encoding="utf-8").strip() if resume and record.is_file() else None
    with _kept_in(folder):
        run = _open_run(mode, tell, dir=folder, id=known, resume="allow" if known else None, **arguments)
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
        run.log({"global_step": step, **pictures_of(wandb, pictures)})

    return images


def _table_logger(run: "wandb.Run", folder: Path) -> Callable[[int, Rows], None]:
    import wandb

    def table(step: int, rows: Rows) -> None:
        with _kept_in(folder):  # the table goes with an artifact of its pictures
            run.log({"global_step": step, "pictures": table_of(wandb, rows)})

    return table


def _open_run(mode: str, tell: Callable[[str], None], **arguments: Any) -> "wandb.Run | None":
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
            tell(f"tracking: {run.url}")
            return run
        except Exception as error:  # CommError, AuthenticationError, a refused key, an unknown entity, ...
            reason = f"no connection: {line(error)}"
    try:
        run = wandb.init(mode="offline", **arguments)
    except Exception as error:
        log.warning("tracking could not be started, the run goes on without it: %s", line(error))
        return None
    tell(f"tracking offline ({reason}); to upload: {_sync(run)}")
    return run


def _close_run(run: "wandb.Run", exit_code: int) -> None:
    import wandb

    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        log.warning("tracking could not be closed (%s); to upload the rest: %s", line(error), _sync(run))
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
        reason = line(error)
    if insist and reason:
        raise InputError(f"tracker.mode=online: {reason}; type `wandb login`, or leave the mode at auto")
    return reason


def _sync(run: "wandb.Run") -> str:
    return shlex.join(["wandb", "sync", str(display_path(Path(run.sync_dir)))])


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Point W&B's cache, data and artifacts into the run folder, unless the user points them elsewhere.

    For as long as W&B looks there, and no longer: several runs may be open in one process. Its settings stay where
    `wandb login` wrote them. Jobs of one process share W&B's service, and with it the cache (a log, in practice) of the
    first."""
    names = {f"WANDB_{kind}_DIR": folder / "wandb" / kind.lower() for kind in ("CACHE", "DATA", "ARTIFACT")}
    missing = [name for name in names if name not in os.environ]
    os.environ |= {name: str(names[name]) for name in missing}
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
