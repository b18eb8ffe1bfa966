"""trackio: a database of all runs on this computer, and a dashboard for it. Nothing leaves the computer."""

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
from lora_lab.runs import display_path, refuse_unwritable, write_text
from lora_lab.track.base import NOTHING, Pictures, Rows, Track, forgiving, line
from lora_lab.track.media import pictures_of, table_of

if TYPE_CHECKING:
    import trackio

log = logging.getLogger(__name__)

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # where trackio would send a run to


@contextmanager
def tracked(
    folder: Path, name: str, config: Mapping[str, Any], resume: bool, *, project: str | None, group: str | None
) -> Iterator[Track]:
    """Track the run in `folder`, which keeps under what name it is known."""
    # trackio reads it once, at its import: all runs of a process are in one place, which is what its dashboard shows.
    place = Path(os.environ.setdefault("TRACKIO_DIR", str(Path("trackio").absolute())))
    project = project or "lora_lab"
    record = folder / "trackio_run"  # trackio finds a run by its name: two of one name would be one
    known = record.read_text(encoding="utf-8").strip() if resume and record.is_file() else None
    name = known or f"{name}, {'-'.join(folder.absolute().parts[-3:])}"
    names = {"project": project, "name": name, "group": group}
    run = _open_run(place, config=dict(config), resume="allow" if known else "never", **names)
    if run is None:
        yield NOTHING
        return
    write_text(record, name + "\n")
    show = shlex.join(["trackio", "show", "--project", project])
    say(f"tracking; to look at it: TRACKIO_DIR={shlex.quote(str(display_path(place)))} {show}")
    try:
        yield forgiving(lambda step, values: run.log(dict(values), step), _image_logger(run), _table_logger(run))
    finally:
        _close_run(run)


def _open_run(place: Path, **arguments: Any) -> "trackio.Run | None":
    try:
        refuse_unwritable(place, "name another with TRACKIO_DIR")  # trackio itself would warn at every step
        import trackio

        with _at_home():
            # In a context of its own: trackio ends the run that is open in this one, and several train at a time.
            return copy_context().run(trackio.init, embed=False, auto_log_cpu=False, auto_log_gpu=False, **arguments)
    except Exception as error:
        log.warning("tracking could not be started, the run goes on without it: %s", line(error))
        return None


def _close_run(run: "trackio.Run") -> None:
    try:
        with redirect_stdout(io.StringIO()):  # it says that it uploads, though it does not
            run.finish()
    except Exception as error:
        log.warning("tracking could not be closed: %s", line(error))


@contextmanager
def _at_home() -> Iterator[None]:
    """Within the context trackio says nothing, neither asks the Hugging Face hub who one is nor heeds the environment
    where it says to send runs away."""
    from huggingface_hub import constants

    offline, elsewhere = constants.HF_HUB_OFFLINE, {name: os.environ.pop(name, None) for name in ELSEWHERE}
    constants.HF_HUB_OFFLINE = True
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        os.environ |= {name: value for name, value in elsewhere.items() if value is not None}


def _image_logger(run: "trackio.Run") -> Callable[[int, Pictures], None]:
    import trackio

    def images(step: int, pictures: Pictures) -> None:
        run.log(pictures_of(trackio, pictures), step)

    return images


def _table_logger(run: "trackio.Run") -> Callable[[int, Rows], None]:
    import trackio

    def table(step: int, rows: Rows) -> None:
        run.log({"pictures": table_of(trackio, rows)}, step)

    return table
