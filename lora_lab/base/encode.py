"""What the frozen base makes of images and texts, computed once: latents and conditioning, kept in the cache.

The cache is a folder of safetensors files that later runs read. A file's name is a hash of all that decides its
content, so a file is never outdated, only no longer asked for."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.base.cuda_graph import GraphPool
from lora_lab.base.protocol import BaseModel, Conditioning, Forms
from lora_lab.console import bar, say
from lora_lab.errors import DiskFullError, RunError
from lora_lab.runs import hash_text, signals_deferred, write_atomically


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
            with signals_deferred(), safe_open(file, "pt") as opened:
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
            # A file that a power failure damages is recognized by its checksum.
            with signals_deferred():
                write_atomically(self._file(kind, key), lambda file: save_file(tensors, file, metadata), durable=False)
        except (OSError, SafetensorError, DiskFullError) as error:
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


@dataclass(frozen=True)
class Encoder:
    """Encodes with `base`, on `device`, what `cache` does not have; with `offload` each component returns to the CPU
    when it is done."""

    base: BaseModel
    device: torch.device
    cache: Cache
    offload: bool
    tokenizers: Sequence[PreTrainedTokenizerBase] | None = None  # of texts that are tokenized only; None encodes them
    graphs: GraphPool | None = None  # memory of the CUDA graphs of training and sampling; made for `device` if None

    def __post_init__(self) -> None:
        if self.graphs is None:
            object.__setattr__(self, "graphs", GraphPool(self.device))

    @cached_property
    def _text_identity(self) -> list[str]:
        return self.base.text_identity()  # hashing the text encoders takes seconds

    @cached_property
    def _image_identity(self) -> str:
        return self.base.image_identity()

    def encode_texts(self, texts: Sequence[str]) -> tuple[dict[str, Conditioning], int]:
        """The conditioning of every text, without a batch dimension, on the CPU, and how many were not in the cache.

        Raises RunError, naming the text, for non-finite values."""
        if self.tokenizers is not None:
            return {text: self.base.tokenize(text, self.tokenizers) for text in texts}, 0
        keys, encoded = dict.fromkeys(texts, ""), {}
        if self.cache.folder is not None:
            forms = self.base.text_forms()
            keys = {text: key_of("conditioning", *self._text_identity, text) for text in keys}
            encoded = {text: c for text in keys if (c := self.cache.get("texts", keys[text], forms))}
        missing = [text for text in keys if text not in encoded]
        new = self.base.encode_texts(missing, self.device, self.offload) if missing else []
        for text, conditioning in zip(missing, new, strict=True):
            encoded[text] = conditioning
            self.cache.put("texts", keys[text], conditioning)
        return encoded, len(missing)

    def encode_images(self, images: Sequence[tuple[str, Image.Image]]) -> tuple[list[Tensor], int]:
        """The latents (C, h, w) of every (name, RGB image), on the CPU, and how many were not in the cache.

        Raises RunError, naming the image, for non-finite values."""
        base, keys = self.base, [""] * len(images)
        encoded: list[Tensor | None] = [None] * len(images)
        if self.cache.folder is not None:
            factor = base.pixels_per_latent
            for i, (_, image) in enumerate(images):
                # The pixels stand for the file, its decoding, bucket, crop and mirroring all at once.
                pixels = hashlib.sha256(image.tobytes()).hexdigest()
                keys[i] = key_of("latents", self._image_identity, image.mode, image.size, pixels)
                shape = (base.latent_channels, image.height // factor, image.width // factor)
                tensors = self.cache.get("latents", keys[i], {"latents": (shape, torch.float32)})
                encoded[i] = tensors and tensors["latents"]
        missing = [i for i, latents in enumerate(encoded) if latents is None]
        if missing:
            with on_device(base.autoencoder, self.device, self.offload):
                for i in bar(missing, desc="encode", unit="picture", leave=False):
                    name, image = images[i]
                    encoded[i] = base.encode_image(image, name)
                    self.cache.put("latents", keys[i], {"latents": encoded[i]})
        return encoded, len(missing)


@contextmanager
def on_device(module: nn.Module, device: torch.device, offload: bool) -> Iterator[None]:
    """Within the context `module` is on `device`; with `offload` it returns to the CPU, unless it was there before.

    A module in training stays where it is: a CUDA graph refers to its weights by their addresses."""
    before = next(module.parameters()).device
    stays = not offload or (before.type == device.type and device.index in (None, before.index))
    module.to(device)
    try:
        yield
    finally:
        if not stays:
            module.to("cpu")
            if device.type == "cuda":
                torch.cuda.empty_cache()
