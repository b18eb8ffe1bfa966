"""What a person sees of a run: lines, which the log keeps too, and progress bars."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

log = logging.getLogger("lora_lab")

_job = ""  # stands before each line of a job that has others beside it


def speak_as(job: str) -> None:
    """From now on say which job a line is of, and show no bars: other jobs write to the same screen."""
    global _job
    _job = job


def say(text: str) -> None:
    """Print, and keep in the run folder's log."""
    lines = text.splitlines() if _job else [text]
    sys.stdout.write("".join(f"{_job}{line}\n" for line in lines))  # in one piece, so that no other's comes between
    sys.stdout.flush()
    log.info(text.strip())


def bar(items: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A progress bar with rate and remaining time. Where nobody watches (a file, CI) it speaks every ten seconds."""
    watched = sys.stderr.isatty()
    return tqdm(items, mininterval=0.1 if watched else 10, dynamic_ncols=watched, disable=bool(_job), **settings)


def quiet_libraries() -> None:
    """What is left on the screen is ours: advice about torchvision or missing kernels helps nobody here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "peft", "accelerate", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module=r"(torch|diffusers|transformers|peft|accelerate|bitsandbytes|huggingface_hub)(\..*)?"
    )


def quiet_loading() -> None:
    """No bar for every model that is read from disk; a download keeps its own, for 7 GB take minutes."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()  # the hub's too
    enable_progress_bars()
