"""The run folder: its files are written atomically, and Ctrl-C waits for the end of a step."""

import errno
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lora_lab.console import say
from lora_lab.errors import DiskFullError, InputError
from lora_lab.settings.schema import STAGES, Config, Stage

if TYPE_CHECKING:
    from PIL import Image

PACKAGES = ("lora_lab", "torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors",
            "hydra-core", "omegaconf", "wandb", "pillow", "numpy")  # fmt: skip
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Names that write_atomically, and safetensors beside it, give to files that are not complete.
TEMPORARY = re.compile(r"\.(.+\.[a-z0-9_]{8}\.\w+|tmp\w{6})")
FULL_HASH_LIMIT = 2**30  # bytes; of a larger file only both ends are hashed: reading 7 GB of SDXL takes a minute
SWEEP_RECORD, STOP_FILE = "multirun.yaml", "stop"  # of a sweep's folder
LONGEST_NAME = 128  # characters of a tracker's project, group and run: W&B's own bound
LOCK, HOLDER = ".lock", ".lock.json"  # of the folder of a run or a sweep: its lock, and which process has it
BEFORE = ".before.json"  # beside them while a command works: what the folder recorded before
POLL_SECONDS = 1.0  # between two looks for the stop file, which may lie on a network drive
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def write_atomically(path: Path, write: Callable[[Path], None], durable: bool = True) -> Path:
    """Let `write` fill a temporary file in the folder of `path`, then rename it; returns `path`.

    A reader never sees a partial file, also after a crash; and not after a power failure either, unless `durable` is
    false, which is for files that can be made again. The temporary name keeps the suffix, because writers (PIL,
    safetensors) choose the format by it. Raises DiskFullError."""
    with disk_full_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())  # mkstemp creates 0600: other users' programs must be able to read it
            if durable:
                sync(temporary)
            temporary.replace(path)
            if durable:
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def sync(path: Path) -> None:
    """Wait until the file, or the names of the files in the folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Within the context an error for want of space, of any library, is raised as a DiskFullError that names `path`."""
    try:
        yield
    except Exception as error:
        number = _disk_full_number(error)
        if number is None or isinstance(error, DiskFullError):
            raise
        raise DiskFullError(
            f"{display_path(path)}: {os.strerror(number)} ({free_space(path)}): free some space"
        ) from error


def _disk_full_number(error: BaseException | None) -> int | None:
    """The number of the system's error for want of space that `error` comes from; None if it does not."""
    while error is not None:
        for number in DISK_FULL:
            if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):  # safetensors' words
                return number
        error = error.__cause__ or error.__context__
    return None


def free_space(path: Path) -> str:
    """The free space of the disk of `path`, or of the folder that it is to be created in, for people."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:.1f} MiB are free"


def remove_temporary_files(*folders: Path) -> None:
    """Remove the incomplete files that killed processes left in `folders`, in which no other process writes now."""
    for folder in folders:
        for file in folder.glob(".*"):
            if TEMPORARY.fullmatch(file.name) and file.is_file():
                file.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8, atomically; returns `path`."""
    return write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> Path:
    """Write `value` as indented JSON, atomically; returns `path`."""
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_result(folder: Path, result: Any) -> Path:
    """Write result.json, the fields of the dataclass `result`, into the run folder; returns the file."""
    return write_json(folder / "result.json", asdict(result))


def read_result(folder: Path) -> dict[str, Any] | None:
    """The content of result.json, or None for a run that has not finished."""
    file = folder / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def sweep_of(folder: Path) -> Path | None:
    """The folder of the sweep that the run in `folder` is a job of, or None."""
    return next((parent for parent in folder.parents[:3] if (parent / SWEEP_RECORD).is_file()), None)


def stop_file_of(folder: Path) -> Path | None:
    """The file that tells the run in `folder` to stop after its step, once it exists; None outside a sweep."""
    sweep = sweep_of(folder)
    return sweep / STOP_FILE if sweep else None


def save_picture(path: Path, picture: "Image.Image", metadata: dict[str, object]) -> Path:
    """Write a PNG with `metadata` (prompt, seed, ...) as text chunks, atomically; returns `path`."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_itxt(key, str(value))
    return write_atomically(path, lambda file: picture.save(file, pnginfo=chunks))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The stems of `paths`, numbered where several are equal, so that output files do not overwrite each other.

    They are cut to 200 bytes: with what is added to them a file name would have more than the 255 that it may."""
    names: dict[str, None] = {}
    for path in paths:
        stem, number = path.stem.encode()[:200].decode(errors="ignore"), 2
        name = stem
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names[name] = None
    return list(names)


def fitting(name: str) -> str:
    """A name that the program made, as every tracker accepts it: at most LONGEST_NAME characters, the first and the
    last ones, and all of them printable."""
    name = "".join(letter if letter.isprintable() else "_" for letter in name)
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def display_path(path: Path) -> Path:
    """`path` relative to the working directory if it lies there, else `path` itself."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def resume_command(folder: Path) -> str:
    """The command that continues the run or the sweep in `folder`, as a shell reads it."""
    return shlex.join(["python", "-m", "lora_lab", f"resume={display_path(folder)}"])


def hash_text(text: str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(*paths: Path) -> str:
    """SHA-256, in hexadecimal, over names and contents of `paths` and of all files below them.

    Of a file above 1 GiB the size and the first and last MiB are hashed."""
    total = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                total.update(f"{file.relative_to(path).as_posix() if path.is_dir() else file.name}\0".encode())
                total.update(_hash_file(file))
    return total.hexdigest()


def hash_content(file: Path) -> str:
    """SHA-256, in hexadecimal, over the whole content of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hash_file(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= FULL_HASH_LIMIT:
            return hashlib.file_digest(stream, "sha256").digest()
        head = stream.read(2**20)
        stream.seek(-(2**20), os.SEEK_END)
        return hashlib.sha256(str(size).encode() + head + stream.read()).digest()


def write_manifest(folder: Path, device: object, hashes: dict[str, str]) -> Path:
    """Write manifest.json: command, versions, device and hashes of the inputs of a run; returns the file."""
    return write_json(
        folder / "manifest.json",
        {
            "command": sys.argv,
            "python": platform.python_version(),
            "system": platform.platform(),
            "device": _describe(device),
            "packages": {name: _version(name) for name in PACKAGES},
            "git": _git_revision(),
            "sha256": hashes,
        },
    )


def refuse_unwritable(folder: Path, hint: str = "set hydra.run.dir= to another folder") -> None:
    """Check, before the work starts, that files can be written into `folder`, which is created if it is missing.

    Raises InputError, whose sentence ends with `hint`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{display_path(folder)}: cannot be written to ({error.strerror}), {hint}") from error


def refuse_used(folder: Path, file: str) -> None:
    """Raise InputError if `folder` has `file`, which every run leaves: a second run would overwrite the first."""
    if (folder / file).exists():
        name = display_path(folder)
        raise InputError(f"{name} has a run already: set hydra.run.dir= to another folder, or resume={name}")


def refuse_missing(folder: Path, resume: str | None) -> None:
    """Raise InputError if `resume` is set and `folder` is missing or empty: a new run would start in silence."""
    if resume and not (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"resume={resume}: {display_path(folder)} has no run, name its folder or leave out resume=")


def create_folder(folder: Path, named: bool, key: str) -> Path:
    """Create `folder` and return it, or one with a number behind its name if two runs start in the same second.

    A folder that the user `named`, by the setting `key`, may exist. Raises InputError."""
    for number in range(1000):
        numbered = folder.with_name(f"{folder.name}-{number}") if number else folder
        try:
            numbered.mkdir(parents=True, exist_ok=named)
            return numbered
        except FileExistsError:
            if named:
                raise InputError(f"{folder}: not a folder, set {key}= to another one") from None
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}; set {key}= to another folder") from error
    raise InputError(f"{folder}: exists, set {key}= to another folder")


@contextmanager
def claimed(folder: Path, wait_seconds: float = 0) -> Iterator[None]:
    """Within the context this process alone may work in the folder of a run or a sweep.

    The system ends the claim when the process dies, however that happens. Raises InputError, naming the process that
    has the folder, if it still has it after `wait_seconds`."""
    lock = _acquire(folder, wait_seconds)
    try:
        write_json(folder / HOLDER, this_process())
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def refuse_claimed(folder: Path) -> None:
    """Raise InputError, naming the process, if another one works in `folder`. Writes nothing."""
    if (folder / LOCK).is_file():
        _acquire(folder, 0).release()


def _acquire(folder: Path, wait_seconds: float) -> FileLock:
    lock = FileLock(folder / LOCK, timeout=wait_seconds)
    try:
        lock.acquire()
    except Timeout:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8")) if (folder / HOLDER).is_file() else {}
        process = "process {pid} on {host}".format(**holder) if holder else "another process"
        raise InputError(
            f"{display_path(folder)} is in use by {process}, which still runs: wait for it or end it, or use another "
            "folder"
        ) from None
    return lock


def this_process() -> dict[str, Any]:
    """Host and process id, by which a user finds this process."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _describe(device: object) -> str:
    if getattr(device, "type", None) != "cuda":
        return f"{device} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The git revision of the checkout that contains this package; None for an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
        )
    except OSError:
        return None
    return described.stdout.strip() or None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def stop_on_signal(folder: Path) -> Iterator[Callable[[], bool]]:
    """Within the context the first Ctrl-C (SIGTERM, hang-up) only sets a flag, so that a checkpoint can be written.

    Gives a function that returns the flag. It is also set once the sweep that the run in `folder` is a job of has its
    stop file. A second Ctrl-C raises KeyboardInterrupt."""
    received: list[int] = []
    polled, stop_file = time.monotonic(), stop_file_of(folder)

    def stopped() -> bool:
        nonlocal polled
        if not received and stop_file is not None and time.monotonic() - polled > POLL_SECONDS:
            polled = time.monotonic()
            if stop_file.exists():
                received.append(0)
        return bool(received)

    with _on_signal(received, lambda: say("stopping after this step (Ctrl-C again stops at once)")):
        yield stopped


@contextmanager
def stop_jobs_on_signal(stop_file: Path) -> Iterator[None]:
    """Within the context the first Ctrl-C creates `stop_file`, which jobs in other processes look for.

    Without it a launcher would kill them in the middle of a step. Raises KeyboardInterrupt at the end of a context that
    received a signal, and at once at the second one."""

    def create_stop_file() -> None:
        stop_file.touch()
        print("stopping all jobs after their step (Ctrl-C again stops at once)", flush=True)

    received: list[int] = []
    with _on_signal(received, create_stop_file):
        yield
    if received:
        raise KeyboardInterrupt


@contextmanager
def _on_signal(received: list[int], on_first: Callable[[], None]) -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        if received:
            interrupt(number, frame)
        leave_terminal(number)
        received.append(number)
        on_first()

    previous = {}
    if threading.current_thread() is threading.main_thread():  # in another one signals do not arrive
        previous = {number: signal.signal(number, handle) for number in _not_ignored()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_deferred(message: str = "") -> Iterator[None]:
    """Within the context the first signal waits for its end, where it arrives, and `message` is printed; a second one
    raises KeyboardInterrupt at once.

    The compiled code of a library may turn a KeyboardInterrupt into an error of its own, or drop it, and a library that
    is interrupted while it starts a thread may leave one that never ends."""
    received: list[int] = []
    try:
        with _on_signal(received, lambda: say(message) if message else None):
            yield
    finally:
        for number in received:
            signal.raise_signal(number)


def interrupt(number: int, frame: object) -> None:
    """A signal handler. Raises KeyboardInterrupt, which says what ended the program."""
    leave_terminal(number)
    raise KeyboardInterrupt("stopped" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}")


def interrupt_on_signals() -> None:
    """Let each of the ENDING signals end this process as Ctrl-C does, with one line, instead of at once in silence."""
    for number in _not_ignored():
        signal.signal(number, interrupt)


def _not_ignored() -> list[int]:
    """The ENDING signals, without those that nohup, or a shell for a job in the background, lets a program ignore."""
    return [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]


def leave_terminal(number: int) -> None:
    """After a hang-up, let output go nowhere: the terminal is gone, and writing to it would raise an error."""
    if number not in (signal.SIGINT, signal.SIGTERM):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # of a terminal that is gone isatty is false
                os.dup2(nowhere, descriptor)


def score_of(result: dict[str, Any] | None) -> float | None:
    """The combined score of a result, which is better the higher it is; None if there is none."""
    return result["scores"]["score"]["value"] if result and result.get("scores") else None


def stage_function(settings: type[Stage]) -> Callable[[Config, Path], object]:
    """The function of the stage with these settings. Imported only now: converting captions must not wait for torch."""
    name = next(name for name, schema in STAGES.items() if schema is settings)
    return getattr(import_module(f"lora_lab.stages.{name}"), name)
