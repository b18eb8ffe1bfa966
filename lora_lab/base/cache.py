"""What the frozen parts made of pictures and captions, kept on disk between runs: one safetensors file a tensor or two.

A file's name is a hash of all that decides what is in it, so a file is never out of date, only no longer asked for."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.console import say
from lora_lab.errors import RunError
from lora_lab.runs import hash_text, write_atomically

Forms = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor by name


@dataclass(frozen=True)
class Cache:
    """`folder`/KIND/KEY.safetensors; without a folder nothing is found and nothing kept.

    Processes may share a folder: files are renamed into place, and two that write one key write the same."""

    folder: Path | None

    def get(self, kind: str, key: str, forms: Forms) -> dict[str, Tensor] | None:
        """What was put under `key`; None if nothing was, or if it is not whole any more, which is said."""
        if self.folder is None or not (file := self._file(kind, key)).is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
                whole = (opened.metadata() or {}).get("sha256") == _checksum(tensors)
        except (OSError, SafetensorError):
            tensors, whole = {}, False
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if not whole or found != forms or not all(tensor.isfinite().all() for tensor in tensors.values()):
            say(f"{file} is damaged: it is made again")
            return None
        return tensors

    def put(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep `tensors`, on the CPU, under `key`. Raises RunError where that cannot be written."""
        if self.folder is None:
            return
        notes = {"sha256": _checksum(tensors)}
        try:
            write_atomically(self._file(kind, key), lambda file: save_file(tensors, file, notes))
        except (OSError, SafetensorError) as error:
            raise RunError(f"cache={self.folder}: cannot be written ({error}): make room, or say cache=null") from error

    def _file(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.safetensors"


def key_of(*parts: object) -> str:
    """One name for all that decides what a file holds."""
    return hash_text(repr(parts))


def identity_of(network: nn.Module) -> str:
    """A hash of a network's weights as loaded, their dtype and its settings: the same however and whence it came.

    All of SDXL's text encoders are 1.6 GB in bfloat16, a second or three."""
    total = hashlib.sha256(_settings(network).encode())
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def rules_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides which tokens it makes of a text; how the last text was padded or cut is not part of it."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hash_text(json.dumps([rules, tokenizer.pad_token_id, tokenizer.model_max_length]))


def _settings(network: nn.Module) -> str:
    config = network.config.to_dict() if hasattr(network.config, "to_dict") else dict(network.config)
    # where it lay and who wrote it down change nothing that it computes
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    return json.dumps(kept, sort_keys=True, default=str)


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(_bytes(tensors[name]))
    return total.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
