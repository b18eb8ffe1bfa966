"""Output for people: lines, which the log keeps too, and progress bars."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("lora_lab")
LONGEST = 2000  # characters of a line
# What moves the cursor, breaks a line or reorders text, and the halves of characters that file names in another
# encoding than UTF-8 are read as. Texts of datasets, LoRA files and records may have them.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` as one line that is safe to print: control characters as escapes such as \\x1b, all after `longest`
    characters cut off."""
    if len(text) > longest:
        text = f"{text[:longest]}... ({len(text) - longest} more)"
    return UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


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
    """Print the lines of `text`, each `printable`, and write them into the run folder's log."""
    text = "\n".join(map(printable, text.split("\n")))
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    log.info(text.strip())


@lru_cache(1000)
def say_once(text: str) -> None:
    """`say`, unless this process has said it: what is true of a file is found again each time that it is read."""
    say(text)


def cut(value: object, most: int = 80) -> str:
    """`value` as Python writes it, in which terminal escapes do nothing, and not much longer than `most` letters."""
    text = repr(value[:most] if isinstance(value, str) else value)
    return f"{text[: most + 2]}..." if len(text) > most + 2 or (isinstance(value, str) and len(value) > most) else text


def warn(text: str) -> None:
    """Print `text` on stderr as one `printable` line."""
    print(f"lora_lab: {printable(text)}", file=sys.stderr, flush=True)


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
