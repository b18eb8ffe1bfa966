"""SDXL's two text encoders, and its micro-conditioning."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.base.encode import on_device
from lora_lab.base.protocol import Conditioning
from lora_lab.errors import RunError


@torch.no_grad()
def encode_texts(
    tokenizers: Sequence[PreTrainedTokenizerBase],
    encoders: Sequence[nn.Module],
    texts: Sequence[str],
    device: torch.device,
    offload: bool,
) -> list[Conditioning]:
    """`prompt_embeds` (77, 2048), of both encoders side by side, and `pooled_prompt_embeds` (1280,), of the second, for
    each text, on the CPU; bit-identical to diffusers' encode_prompt.

    Each encoder does all texts before the next one begins. CLIP cuts texts after 77 tokens (stage=check names them).
    Raises RunError, naming the text, for non-finite values."""
    hidden, pooled = [], []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        with on_device(encoder, device, offload):
            outputs = [_encode(tokenizer, encoder, text) for text in texts]
        hidden.append([layer for layer, _ in outputs])
        pooled = [embedding for _, embedding in outputs]  # of the last encoder
    dtype = encoders[-1].dtype
    encoded = [
        {"prompt_embeds": torch.cat(layers, dim=-1).to(dtype), "pooled_prompt_embeds": embedding}
        for layers, embedding in zip(zip(*hidden, strict=True), pooled, strict=True)
    ]
    for text, conditioning in zip(texts, encoded, strict=True):
        if not all(value.isfinite().all() for value in conditioning.values()):
            raise RunError(f"{text!r}: the text encoders gave values that are not finite; use model.precision=fp32")
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, encoder: nn.Module, text: str) -> tuple[Tensor, Tensor]:
    """The last hidden layer but one (77, width), and the encoder's first output, which is the pooled text of SDXL's
    second encoder."""
    output = encoder(token_ids(tokenizer, text).to(encoder.device), output_hidden_states=True)
    return output.hidden_states[-2][0].cpu(), output[0][0].cpu()


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids (1, 77)."""
    return tokenizer(
        text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def encode_tokens(encoders: Iterable[nn.Module], conditioning: Conditioning) -> Conditioning:
    """`conditioning` with `prompt_embeds` (B, 77, 2048) and `pooled_prompt_embeds` (B, 1280) in place of `input_ids`
    (B, 2, 77) and `has_caption` (B,), as encode_texts has them: zeros where there is no caption."""
    rest = dict(conditioning)
    ids, dropped = rest.pop("input_ids"), ~rest.pop("has_caption")
    outputs = [encoder(ids[:, i], output_hidden_states=True) for i, encoder in enumerate(encoders)]
    pooled = outputs[-1][0]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).to(pooled.dtype)
    return {
        "prompt_embeds": hidden.masked_fill(dropped[:, None, None], 0),
        "pooled_prompt_embeds": pooled.masked_fill(dropped[:, None], 0),
        **rest,
    }


def drop_text(conditioning: Conditioning) -> Conditioning:
    """Zeros in place of a text's embeddings; of token ids, `has_caption` turned off."""
    dropped = ("has_caption",) if "has_caption" in conditioning else ("prompt_embeds", "pooled_prompt_embeds")
    return {name: torch.zeros_like(value) if name in dropped else value for name, value in conditioning.items()}


def micro_conditioning(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """SDXL's `time_ids` (6,): original height and width, crop top and left, target height and width, all in pixels.

    Source: Podell et al. 2023, arXiv 2307.01952, section 2.2."""
    return torch.tensor([*original, *crop, *target], dtype=torch.float32)
