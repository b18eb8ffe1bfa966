"""What a sweep does for its page after every job, and at its end in the process that started it."""

import sys
from pathlib import Path

from filelock import FileLock

from lora_lab.errors import InputError
from lora_lab.runs import as_typed
from lora_lab.settings.schema import Tracker

LOCK = ".page.lock"


def sweep_of(folder: Path) -> Path | None:
    """The sweep that a run is a job of, for one that is taken up alone."""
    return next((above for above in folder.parents[:3] if (above / "multirun.yaml").is_file()), None)


def rewrite_page(sweep: Path) -> Path | None:
    """The sweep's page, from the files as they are; None where nothing trains. Of several processes each waits for its
    turn, and so the last to write has read what all others left.

    A page that cannot be written costs a line on stderr, never a job."""
    from lora_lab.board.page import write_page
    from lora_lab.board.read import read_sweep
    from lora_lab.board.verdict import verdict

    sweep = as_typed(sweep)  # so that the page's commands are
    if not sweep.is_dir():  # no job began
        return None
    try:
        with FileLock(sweep / LOCK, timeout=60):
            found = read_sweep([sweep])
            return write_page(found, verdict(found), sweep) if found.runs else None
    except InputError as error:
        print(f"lora_lab: {error}", file=sys.stderr)
    except Exception as error:
        print(f"lora_lab: the comparison page of {sweep} could not be written ({error!r})", file=sys.stderr)
    return None


def attach_page(sweep: Path, tracker: Tracker) -> None:
    """Log the page of `sweep`, which has ended, to W&B: once, and again only when it has changed.

    What goes wrong costs a line on stderr."""
    from lora_lab.board.page import shared
    from lora_lab.track import wandb

    names = {"project": tracker.project, "group": tracker.group, "tags": tracker.tags}
    try:
        wandb.attach(sweep, shared(sweep), tracker.mode, names)
    except Exception as error:
        print(f"lora_lab: the comparison page of {as_typed(sweep)} could not be tracked ({error!r})", file=sys.stderr)
