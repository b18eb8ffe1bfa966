"""LoRA files on disk: find, save, compare and number them."""

import difflib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_lab.adapters.metadata import read_metadata
from lora_lab.adapters.tokens import is_embeddings_file, read_tokens
from lora_lab.errors import InputError
from lora_lab.runs import write_atomically

MODELS = Path("models") / "lora"  # in the user's working folder


def resolve_lora(value: str, trigger: str | None) -> Path:
    """The file that lora=`value` names. Raises InputError for a missing file, for one without the embeddings that it
    needs, and for one that was trained on another trigger than `trigger`, which would not render the character."""
    lora = find_lora(value)
    read_tokens(lora)
    trained = read_metadata(lora).get("modelspec.trigger_phrase")
    if trained and trigger and trained != trigger:
        raise InputError(f"{lora.name} was trained on the trigger {trained}, not {trigger}: set trigger={trained}")
    return lora


def find_lora(value: str, key: str = "lora") -> Path:
    """The file that `key`=`value` names: a file, a name in models/lora, or a run folder. Raises InputError."""
    path = Path(value)
    if path.is_file():
        return path
    if path.is_dir():
        result = path / "result.json"
        lora = json.loads(result.read_text(encoding="utf-8")).get("lora") if result.is_file() else None
        candidates = [Path(lora)] if lora else []
        # In reverse order of names the finished NAME.safetensors comes first, then the newest NAME-000100.safetensors.
        snapshots = sorted(_loras(path / "lora"), reverse=True)
        candidates += [path / "lora" / Path(lora).name] if lora else snapshots
        for file in candidates:
            if file.is_file():
                return file
        raise InputError(
            f"{key}={value}: this folder has no finished LoRA (neither result.json nor lora/*.safetensors)"
        )
    named = MODELS / f"{value}.safetensors"
    if named.is_file():
        return named
    names = sorted(file.stem for file in _loras(MODELS))
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"{MODELS} has {', '.join(names) or 'none yet: train one'}"
    raise InputError(f"{key}={value}: no such file, run folder or name; {hint}")


def _loras(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*.safetensors") if not is_embeddings_file(file)]


def save_lora(path: Path, state: dict[str, Tensor], dtype: torch.dtype, metadata: dict[str, str]) -> Path:
    """Write `state` (of keys.kohya_state, any shapes) in `dtype`, atomically; alphas stay float32: they are exact."""
    cast = {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in state.items()}
    return write_atomically(path, lambda file: save_file(cast, str(file), metadata=metadata))


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two files hold the same LoRA. Their bytes may differ: safetensors writes metadata in no fixed order."""
    try:
        one, other = load_file(str(first)), load_file(str(second))
    except SafetensorError:
        return False
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def keep_older(path: Path) -> Path | None:
    """Rename an existing file to a free number (NAME.1.safetensors), so that a new one can take its name; returns the
    new path, None if there was no file."""
    if not path.exists():
        return None
    numbered = re.compile(rf"{re.escape(path.stem)}\.(\d+){path.suffix}")
    numbers = [int(match[1]) for file in path.parent.iterdir() if (match := numbered.fullmatch(file.name))]
    older = path.with_name(f"{path.stem}.{max(numbers, default=0) + 1}{path.suffix}")
    path.rename(older)
    return older
