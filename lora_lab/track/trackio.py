"""trackio: a database and a dashboard of all runs on this computer. Nothing is sent to other computers."""

import io
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.runs import LONGEST_NAME, display_path, fitting, refuse_unwritable, write_text
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
    import trackio

log = logging.getLogger(__name__)

REMOTE_VARIABLES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # make trackio send runs to another computer


# The ends of a project's name that trackio uses for files of its own, beside those of a project of the rest.
RESERVED = ("system", "configs", "traces", "artifacts", "artifact_versions", "artifact_aliases", "run_artifact_links")


def validate(settings: Tracker) -> None:
    """Raise InputError for a project or group that trackio does not accept."""
    for key, name in (("tracker.project", settings.project), ("tracker.group", settings.group)):
        validate_name(key, name)
    project = settings.project or ""
    # trackio leaves other letters out, and two projects that differ in them would be one.
    if odd := [letter for letter in project if not (letter.isalnum() or letter in "-_")]:
        raise InputError(f"tracker.project={project}: trackio has only letters, digits, - and _, not {odd[0]!r}")
    if len(project.encode()) > LONGEST_NAME:  # of a file, with suffixes
        raise InputError(f"tracker.project={project}: is too long as the name of trackio's file, use a shorter one")
    if project.startswith("registry-") or project.endswith(tuple(f"_{word}" for word in RESERVED)):
        raise InputError(
            f"tracker.project={project}: trackio reserves names that begin with registry- or end with "
            f"_{', _'.join(RESERVED)}"
        )


@contextmanager
def open_track(folder: Path, name: str, config: Mapping[str, Any], resume: bool, settings: Tracker) -> Iterator[Track]:
    """Within the context track the run in `folder`, where its name in trackio is kept."""
    # trackio reads the variable once, when it is imported. So all runs of a process are in one database, which is what
    # its dashboard shows.
    database = Path(os.environ.setdefault("TRACKIO_DIR", str(Path("trackio").absolute())))
    project = settings.project or "lora_lab"
    record = folder / "trackio_run"  # trackio identifies a run by its name: two runs of one name would be merged
    resumed = record.read_text(encoding="utf-8").strip() if resume and record.is_file() else None
    name = resumed or f"{fitting(name)}, {'-'.join(folder.absolute().parts[-3:])}"
    names = {"project": project, "name": name, "group": settings.group}
    run = _open_run(database, config=dict(config), resume="allow" if resumed else "never", **names)
    if run is None:
        yield NO_TRACK
        return
    write_text(record, name + "\n")
    show = shlex.join(["trackio", "show", "--project", project])
    say(f"tracking; to show it: TRACKIO_DIR={shlex.quote(str(display_path(database)))} {show}")
    try:
        yield log_errors(lambda step, values: run.log(dict(values), step), _image_logger(run), _table_logger(run))
    finally:
        _close_run(run)


def _open_run(database: Path, **arguments: Any) -> "trackio.Run | None":
    try:
        refuse_unwritable(database, "set TRACKIO_DIR to another folder")  # else trackio warns at every step
        import trackio

        with _local_and_silent():
            # In a context of its own, because trackio ends the run that is open in this one, and a pack has several.
            return copy_context().run(trackio.init, embed=False, auto_log_cpu=False, auto_log_gpu=False, **arguments)
    except Exception as error:
        log.warning("tracking could not be started, the run continues without it: %s", first_line(error))
        return None


def _close_run(run: "trackio.Run") -> None:
    try:
        with redirect_stdout(io.StringIO()):  # it prints that it uploads, although it does not
            run.finish()
    except Exception as error:
        log.warning("tracking could not be closed: %s", first_line(error))


@contextmanager
def _local_and_silent() -> Iterator[None]:
    """Within the context trackio prints nothing, does not contact the Hugging Face hub, and sends runs nowhere."""
    from huggingface_hub import constants

    offline, remote = constants.HF_HUB_OFFLINE, {name: os.environ.pop(name, None) for name in REMOTE_VARIABLES}
    constants.HF_HUB_OFFLINE = True
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        os.environ |= {name: value for name, value in remote.items() if value is not None}


def _image_logger(run: "trackio.Run") -> Callable[[int, Pictures], None]:
    import trackio

    def images(step: int, pictures: Pictures) -> None:
        run.log(images_of(trackio, pictures), step)

    return images


def _table_logger(run: "trackio.Run") -> Callable[[int, Rows], None]:
    import trackio

    def table(step: int, rows: Rows) -> None:
        run.log({"pictures": table_of(trackio, rows)}, step)

    return table
