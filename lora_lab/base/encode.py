"""What the frozen base makes of images and texts, computed once: latents and conditioning, through the cache."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.base.cache import Cache, key_of
from lora_lab.base.cuda_graph import GraphPool
from lora_lab.base.protocol import BaseModel, Conditioning
from lora_lab.console import bar


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
