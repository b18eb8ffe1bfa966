"""The run folder: what is written there is whole, or it is not there."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

PACKAGES = ("lora_lab", "torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors",
            "hydra-core", "omegaconf", "wandb", "pillow", "numpy")  # fmt: skip
WHOLE_HASH = 2**30  # bytes; of larger files the ends are hashed: reading 7 GB of SDXL would cost a minute


def write_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it: a reader or a crash never sees half a file.

    The temporary name keeps the suffix, because writers (PIL, safetensors) choose the format by it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes 0600: other programs must be able to read a LoRA
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    return write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> Path:
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def save_picture(path: Path, picture: "Image.Image", notes: dict[str, object]) -> Path:
    """Write a PNG with `notes` (prompt, seed, ...) as text chunks, so that a picture says how it was made."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, value in notes.items():
        chunks.add_itxt(key, str(value))
    return write_atomically(path, lambda file: picture.save(file, pnginfo=chunks))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """File stems, with a number where two share one, so that nothing made of one overwrites another's."""
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names.append(name)
    return names


def as_typed(path: Path) -> Path:
    """`path` as a person says it: seen from where they work, if it lies there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_files(*paths: Path) -> str:
    """SHA-256 over names and contents of files and of all files in folders.

    Of a file above 1 GiB the size and the first and last MiB stand for the whole."""
    total = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                total.update(f"{file.relative_to(path).as_posix() if path.is_dir() else file.name}\0".encode())
                total.update(_hash_file(file))
    return total.hexdigest()


def _hash_file(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE_HASH:
            return (
                hashlib.file_digest(stream, "sha256").digest()
                if sys.version_info >= (3, 11)
                else _sha256(stream.read())
            )
        head = stream.read(2**20)
        stream.seek(-(2**20), os.SEEK_END)
        return _sha256(str(size).encode() + head + stream.read())


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def write_manifest(folder: Path, device: object, hashes: dict[str, str]) -> Path:
    """manifest.json: with what a run was made."""
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


def refuse_unwritable(folder: Path, hint: str = "choose another with hydra.run.dir=") -> None:
    """Raise InputError now rather than lose an hour's work at the first write."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror}), {hint}") from error


def refuse_used(folder: Path, sign: str) -> None:
    """Raise InputError if `sign`, which a run leaves, is in `folder`: a second run would write over the first."""
    if (folder / sign).exists():
        raise InputError(f"{folder} has a run already: name another folder with hydra.run.dir=, or say resume={folder}")


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
    """The revision of the checkout that this package lies in; None for an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    try:
        asked = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
        )
    except OSError:
        return None
    return asked.stdout.strip() or None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
