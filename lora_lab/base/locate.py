"""Where a model, captioner or dataset lies: on disk, in the package or on the hub."""

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_lab import demo
from lora_lab.errors import InputError
from lora_lab.runs import hash_files, signals_deferred

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")  # to read such a file is to run what is in it
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate_folder(key: str, value: str | None) -> Path:
    """The existing folder or file that `value` names; `demo:NAME` lies in the package.

    Raises InputError, naming `key`, if there is none."""
    if value is None:
        raise InputError(f"{key} is missing: set {key}=FOLDER")
    path = demo.HERE / value.removeprefix("demo:") if value.startswith("demo:") else Path(value)
    try:
        str(path.resolve()).encode()  # records and results are UTF-8
        exists = path.exists()
    except UnicodeEncodeError as error:
        raise InputError(f"{key}={value}: the path is not UTF-8: rename the file or folder") from error
    except (OSError, RuntimeError) as error:  # a name over 255 bytes, a link to itself
        reason = getattr(error, "strerror", None) or "it is a link to itself"
        raise InputError(f"{key}={value}: this is not a file or folder ({reason}): correct the name") from error
    if not exists:
        raise InputError(f"{key}={value}: there is no such file or folder{_nearest(path)}")
    return path


def locate_model(key: str, value: str) -> str:
    """A folder or file that exists, else a hub id (`owner/name`) that the libraries download. Raises InputError, also
    for a file that could run code."""
    refuse_pickle(key, value)
    if value.startswith("demo:") or Path(value).exists():
        return str(locate_folder(key, value))
    # A name with a suffix or an absolute path is a missing file, never a repository.
    if HUB_ID.fullmatch(value) and not value.endswith((".safetensors", ".ckpt")) and not value.startswith((".", "/")):
        return value
    raise InputError(f"{key}={value}: no such file or folder, and not a hub id like owner/name{_nearest(Path(value))}")


def refuse_pickle(key: str, value: str) -> None:
    """Raise InputError for a file of weights that is a pickle by its name; it is not opened."""
    suffix = Path(value).suffix.lower()
    if suffix in PICKLES and not Path(value).is_dir():
        raise InputError(
            f"{key}={value}: a {suffix} file can hold code that runs when it is read, name a .safetensors file"
        )


def hash_model(location: str) -> str:
    """What tells the model at a location of `locate_model` from others: a hash of its files, or its hub id."""
    return hash_files(Path(location)) if Path(location).exists() else f"hub:{location}"


@contextmanager
def loading(location: str, failure: str, hint: str = "") -> Iterator[None]:
    """Within the context a library loads the model at a location of `locate_model`.

    Raises InputError, with `failure`, the reason and `hint`, for any error: for files that are missing, damaged or of
    another kind libraries raise nearly anything. A signal waits, and is none."""
    try:
        with signals_deferred("stopping once the model is loaded (Ctrl-C again stops at once)"):
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{failure} ({_reason(location, error)}){hint}") from error


def _reason(location: str, error: Exception) -> str:
    """The damaged file, code of its own, or the first line of the error, without a full stop."""
    path = Path(location)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    damaged = next((file for file in files if file.is_file() and _is_damaged(file)), None)
    if damaged:
        return f"{damaged} is cut off or damaged, copy it again"
    if "custom code" in str(error):
        return "it needs Python code that comes with it, which is never run"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".")


def _is_damaged(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with signals_deferred():
            if file.suffix == ".safetensors":
                with safe_open(file, "np"):  # compares the header with the length of the file
                    return False
            if file.suffix == ".json":
                json.loads(file.read_bytes())
    except (OSError, SafetensorError, ValueError, RecursionError):
        return True
    return False


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f", did you mean {path.parent / close[0]}?" if close else ""


def writable_folder(key: str, value: str | None) -> Path:
    """A folder of the user's that can be written to. Raises InputError, also for a folder of the package."""
    path = locate_folder(key, value)
    if demo.HERE in (path.resolve(), *path.resolve().parents):
        raise InputError(f"{key}={value}: the bundled files are not written to, copy the folder and name the copy")
    if not os.access(path, os.W_OK):
        raise InputError(f"{key}={value}: this folder cannot be written to, change its permissions or copy it")
    return path
