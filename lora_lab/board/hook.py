"""Keep the page of a sweep current: rewritten after each job, and logged to the tracker at the end."""

import sys
from pathlib import Path

from filelock import FileLock

from lora_lab.errors import InputError
from lora_lab.runs import display_path
from lora_lab.settings.schema import Tracker

LOCK = ".page.lock"


def rewrite_page(sweep: Path) -> Path | None:
    """Write the page of `sweep` from the files that are there, and return it; None if nothing trains or it failed.

    Of several processes each waits for the others, so the last one to write has read what all of them left. An error is
    one line on stderr, and never ends a job."""
    from lora_lab.board.page import write_page
    from lora_lab.board.read import read_sweep
    from lora_lab.board.verdict import verdict

    sweep = display_path(sweep)  # the page's commands name folders relative to the working directory
    if not sweep.is_dir():  # no job was started
        return None
    try:
        with FileLock(sweep / LOCK, timeout=60):
            content = read_sweep([sweep])
            return write_page(content, verdict(content), sweep) if content.runs else None
    except InputError as error:
        print(f"lora_lab: {error}", file=sys.stderr)
    except Exception as error:
        print(f"lora_lab: the comparison page of {sweep} could not be written ({error!r})", file=sys.stderr)
    return None


def attach_page(sweep: Path, tracker: Tracker) -> None:
    """Log the page of the finished `sweep` to W&B, unless the same page was logged before.

    An error is one line on stderr."""
    from lora_lab.board.page import files_to_share
    from lora_lab.track import wandb

    names = {"project": tracker.project, "group": tracker.group, "tags": tracker.tags}
    try:
        wandb.attach(sweep, files_to_share(sweep), tracker.mode, names)
    except Exception as error:
        print(
            f"lora_lab: the comparison page of {display_path(sweep)} could not be logged ({error!r})", file=sys.stderr
        )
