"""What a person sees of a run: lines, which the log keeps too, and progress bars."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

log = logging.getLogger("lora_lab")


def say(text: str) -> None:
    """Print, and keep in the run folder's log."""
    print(text, flush=True)
    log.info(text.strip())


def bar(items: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A progress bar with rate and remaining time. Where nobody watches (a file, CI) it speaks every ten seconds."""
    watched = sys.stderr.isatty()
    return tqdm(items, mininterval=0.1 if watched else 10, dynamic_ncols=watched, **settings)
