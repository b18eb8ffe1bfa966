"""What the frozen base made of images and texts, kept on disk between runs in safetensors files.

A file's name is a hash of all that decides its content, so a file is never outdated, only no longer asked for."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.base.protocol import Forms
from lora_lab.console import say
from lora_lab.errors import RunError
from lora_lab.runs import hash_text, write_atomically


@dataclass(frozen=True)
class Cache:
    """`folder`/KIND/KEY.safetensors; without a folder nothing is found and nothing is stored.

    Processes may share a folder: files are renamed into place, and two processes that write one key write the same."""

    folder: Path | None

    def get(self, kind: str, key: str, forms: Forms) -> dict[str, Tensor] | None:
        """The tensors stored under `key`, on the CPU; None if there are none, or if the file is damaged or has other
        shapes or dtypes than `forms`, which is printed."""
        if self.folder is None or not (file := self._file(kind, key)).is_file():
            return None
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
                intact = (opened.metadata() or {}).get("sha256") == _checksum(tensors)
        except (OSError, SafetensorError):
            tensors, intact = {}, False
        stored = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if not intact or stored != forms or not all(tensor.isfinite().all() for tensor in tensors.values()):
            say(f"{file} is damaged: it is made again")
            return None
        return tensors

    def put(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        """Store `tensors`, of any shapes, on the CPU. Raises RunError where the folder cannot be written."""
        if self.folder is None:
            return
        metadata = {"sha256": _checksum(tensors)}
        try:
            write_atomically(self._file(kind, key), lambda file: save_file(tensors, file, metadata))
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"cache={self.folder}: cannot be written ({error}): free some space, or use cache=null"
            ) from error

    def _file(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.safetensors"


def key_of(*parts: object) -> str:
    """A hash of all that decides what a file holds."""
    return hash_text(repr(parts))


def identity_of(network: nn.Module) -> str:
    """A hash of a network's weights, their dtype and its configuration: the same wherever it was loaded from.

    SDXL's text encoders are 1.6 GB in bfloat16, which takes up to three seconds."""
    digest = hashlib.sha256(_configuration(network).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def rules_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides a tokenizer's tokens; how the last text was padded or cut is not part of it."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    return hash_text(json.dumps([rules, tokenizer.pad_token_id, tokenizer.model_max_length]))


def _configuration(network: nn.Module) -> str:
    config = network.config.to_dict() if hasattr(network.config, "to_dict") else dict(network.config)
    # Its path and the version that wrote it change nothing that it computes.
    decisive = {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}
    return json.dumps(decisive, sort_keys=True, default=str)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
