"""Output for people: lines, which the log keeps too, and progress bars."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("lora_lab")


class LabelledOutput:
    """A text stream that puts `label` in front of each line and passes only whole lines on."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self.stream, self.label, self._partial_line = stream, label, ""

    def write(self, text: str) -> int:
        *lines, self._partial_line = (self._partial_line + text).split("\n")
        if lines:  # in one call, so that no line of another process comes between
            self.stream.write("".join(f"{self.label}{line}\n" for line in lines))
        return len(text)

    def __getattr__(self, name: str) -> Any:  # flush, isatty, encoding, ...
        return getattr(self.stream, name)


@contextmanager
def labelled_output(label: str) -> Iterator[None]:
    """Within the context each line on stdout begins with `label`, and there are no progress bars.

    For a job that shares the screen with jobs of other processes. An inner label replaces an outer one."""
    stream = sys.stdout.stream if isinstance(sys.stdout, LabelledOutput) else sys.stdout
    with redirect_stdout(LabelledOutput(stream, label)):
        yield


def say(text: str) -> None:
    """Print `text`, and write it into the run folder's log."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    log.info(text.strip())


def bar(items: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A progress bar with rate and remaining time; `settings` are tqdm's.

    Without a terminal (a file, CI) it is updated every ten seconds. Jobs that share a screen have none, for their bars
    would overwrite each other."""
    interactive, shared = sys.stderr.isatty(), isinstance(sys.stdout, LabelledOutput)
    return tqdm(items, mininterval=0.1 if interactive else 10, dynamic_ncols=interactive, disable=shared, **settings)


def quiet_libraries() -> None:
    """Silence the warnings of libraries, such as advice about torchvision or missing kernels, which help no user."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.raiseExceptions = False  # a line that a full disk cannot hold has no traceback: the run reports the disk
    for name in ("bitsandbytes", "peft", "accelerate", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", module=r"(torch|diffusers|transformers|peft|accelerate|bitsandbytes|huggingface_hub)(\..*)?"
    )


def quiet_loading() -> None:
    """Show no progress bar when a model is read from disk; downloads keep theirs, because 7 GB take minutes."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()  # also switches off the bars of huggingface_hub
    enable_progress_bars()
