"""What the frozen parts make of pictures and captions, computed once: latents, text embeddings, micro-conditioning."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.base.cache import Cache, identity_of, key_of, rules_of
from lora_lab.console import bar
from lora_lab.errors import RunError


@dataclass(frozen=True)
class TextEmbedding:
    """One caption as SDXL's UNet sees it."""

    tokens: Tensor  # (77, 2048): both encoders side by side
    pooled: Tensor  # (1280,): the second encoder's

    def to(self, device: torch.device) -> "TextEmbedding":
        return TextEmbedding(self.tokens.to(device), self.pooled.to(device))

    def left_out(self) -> "TextEmbedding":
        """What stands for no text where that is zeros."""
        return TextEmbedding(torch.zeros_like(self.tokens), torch.zeros_like(self.pooled))


@dataclass(frozen=True)
class TextIds:
    """One caption as token ids, for encoders that learn."""

    ids: Tensor  # (2, 77): those of either encoder
    given: Tensor  # () whether the text is given; if not, zeros stand for it

    def to(self, device: torch.device) -> "TextIds":
        return TextIds(self.ids.to(device), self.given.to(device))

    def left_out(self) -> "TextIds":
        """What stands for no text where that is zeros."""
        return TextIds(self.ids, torch.zeros_like(self.given))


@dataclass(frozen=True)
class Encoder:
    """Encodes what `cache` does not have, on `device`; with `offload` each part goes back to the CPU after its turn."""

    pipe: StableDiffusionXLPipeline
    device: torch.device
    cache: Cache
    offload: bool
    tokenizers: Sequence[PreTrainedTokenizerBase] | None = None  # of texts that stay token ids; None encodes them

    @cached_property
    def _texts_by(self) -> list[str]:
        """What decides an embedding beside its caption; hashing the encoders takes seconds, so it is done once."""
        pipe = self.pipe
        encoders = map(identity_of, (pipe.text_encoder, pipe.text_encoder_2))
        return [*encoders, *map(rules_of, (pipe.tokenizer, pipe.tokenizer_2))]

    @cached_property
    def _latents_by(self) -> str:
        vae = self.pipe.vae
        return identity_of(vae) + (f" in tiles of {vae.tile_sample_min_size}" if vae.use_tiling else "")

    def captions(self, captions: Sequence[str]) -> tuple[dict[str, TextEmbedding | TextIds], int]:
        """Every caption's embedding, on the CPU, and how many had to be made: one text encoder after the other."""
        if self.tokenizers is not None:
            given = torch.tensor(True)
            return {text: TextIds(torch.cat([_ids(t, text) for t in self.tokenizers]), given) for text in captions}, 0
        pipe, first, second = self.pipe, self.pipe.text_encoder, self.pipe.text_encoder_2
        width = first.config.hidden_size + second.config.hidden_size
        forms = {
            "tokens": ((pipe.tokenizer.model_max_length, width), second.dtype),
            "pooled": ((second.config.projection_dim,), second.dtype),
        }
        keys, found = dict.fromkeys(captions, ""), {}
        if self.cache.folder is not None:
            keys = {caption: key_of("text embedding", *self._texts_by, caption) for caption in keys}
            found = {c: TextEmbedding(**t) for c in keys if (t := self.cache.get("texts", keys[c], forms))}
        missing = [caption for caption in keys if caption not in found]
        made = encode_captions(pipe, missing, self.device, self.offload) if missing else []
        for caption, text in zip(missing, made, strict=True):
            found[caption] = text
            self.cache.put("texts", keys[caption], vars(text))
        return found, len(missing)

    def pictures(self, pictures: Sequence[tuple[str, Image.Image]]) -> tuple[list[Tensor], int]:
        """The latents of every (name, picture), on the CPU, and how many had to be made."""
        vae, found, keys = self.pipe.vae, [None] * len(pictures), [""] * len(pictures)
        if self.cache.folder is not None:
            factor = self.pipe.vae_scale_factor
            for i, (_, picture) in enumerate(pictures):
                # The pixels stand for the file, its decoding, bucket, crop and mirroring all at once.
                pixels = hashlib.sha256(picture.tobytes()).hexdigest()
                keys[i] = key_of("latents", self._latents_by, picture.mode, picture.size, pixels)
                shape = (vae.config.latent_channels, picture.height // factor, picture.width // factor)
                kept = self.cache.get("latents", keys[i], {"latents": (shape, torch.float32)})
                found[i] = kept and kept["latents"]
        missing = [i for i, latents in enumerate(found) if latents is None]
        if missing:
            with in_turn(vae, self.device, self.offload):
                for i in bar(missing, desc="encode", unit="picture", leave=False):
                    name, picture = pictures[i]
                    found[i] = encode_picture(self.pipe, picture, name)
                    self.cache.put("latents", keys[i], {"latents": found[i]})
        return found, len(missing)


@contextmanager
def in_turn(part: nn.Module, device: torch.device, offload: bool) -> Iterator[None]:
    """Have `part` on `device` for a while; with `offload` it leaves again, unless it was there before.

    What is in training stays: a recorded step knows its weights by where they lie."""
    there = next(part.parameters()).device
    stays = not offload or (there.type == device.type and device.index in (None, there.index))
    part.to(device)
    try:
        yield
    finally:
        if not stays:
            part.to("cpu")
            if device.type == "cuda":
                torch.cuda.empty_cache()


@torch.no_grad()
def encode_captions(
    pipe: StableDiffusionXLPipeline, captions: Sequence[str], device: torch.device, offload: bool
) -> list[TextEmbedding]:
    """What `pipe.encode_prompt` makes of each caption, to the bit; one encoder does all of them before the other.

    Captions longer than 77 tokens are cut by CLIP (stage=check names them). Raises RunError, naming the caption, for
    numbers that are not finite."""
    hidden, pooled = [], []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        with in_turn(encoder, device, offload):
            outputs = [_read(tokenizer, encoder, caption) for caption in captions]
        hidden.append([layer for layer, _ in outputs])
        pooled = [text for _, text in outputs]  # of the last encoder
    dtype = pipe.text_encoder_2.dtype
    texts = [
        TextEmbedding(torch.cat(layers, dim=-1).to(dtype), text)
        for layers, text in zip(zip(*hidden, strict=True), pooled, strict=True)
    ]
    for caption, text in zip(captions, texts, strict=True):
        if not (text.tokens.isfinite().all() and text.pooled.isfinite().all()):
            raise RunError(f"{caption!r}: the text encoders gave numbers that are not finite; use model.precision=fp32")
    return texts


def encode_ids(encoders: Sequence[nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """The texts of token ids (B, 2, 77) as `encode_captions` has them: tokens (B, 77, 2048) and pooled (B, 1280), with
    the encoders' gradients, and waiting for no number."""
    outputs = [encoder(ids[:, i], output_hidden_states=True) for i, encoder in enumerate(encoders)]
    pooled = outputs[-1][0]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).to(pooled.dtype), pooled


def _read(tokenizer: PreTrainedTokenizerBase, encoder: nn.Module, caption: str) -> tuple[Tensor, Tensor]:
    """The last hidden layer but one (77, width), and what the encoder says first, which is the pooled text of SDXL's
    second."""
    output = encoder(_ids(tokenizer, caption).to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-2][0].cpu(), output[0][0].cpu()


def _ids(tokenizer: PreTrainedTokenizerBase, caption: str) -> Tensor:
    """Token ids (1, 77)."""
    return tokenizer(
        caption, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_picture(pipe: StableDiffusionXLPipeline, picture: Image.Image, name: str) -> Tensor:
    """Latents (4, height / 8, width / 8) of an RGB picture whose sides are multiples of the VAE's factor (8 for SDXL).

    The mean of the VAE's posterior, scaled: its spread is a thousandth of the noise that training adds.
    SDXL's own VAE overflows in float16, so a VAE that asks for it (force_upcast) encodes in float32."""
    vae = pipe.vae
    dtype = vae.dtype
    upcast = vae.config.force_upcast and dtype == torch.float16
    if upcast:
        vae.float()
    pixels = VaeImageProcessor().preprocess(picture).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mode()[0].float() * vae.config.scaling_factor
    if upcast:
        vae.to(dtype)
    if not latents.isfinite().all():
        raise RunError(
            f"{name}: the VAE gave numbers that are not finite; use model.precision=fp32 or another model.vae"
        )
    return latents.cpu().contiguous()


def micro_conditioning(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """SDXL's six numbers (6,): original height and width, crop top and left, target height and width, all in pixels.

    Source: Podell et al. 2023, arXiv 2307.01952, section 2.2."""
    return torch.tensor([*original, *crop, *target], dtype=torch.float32)
