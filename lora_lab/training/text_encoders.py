"""The trainable parts of the text encoders: their LoRAs, and new tokens for the trigger. Captions are then not encoded
beforehand: a batch has token ids, and the text encoders run inside the step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from lora_lab.adapters.files import COUNT, read_tokens
from lora_lab.adapters.inject import is_pissa
from lora_lab.adapters.tokens import NewTokens, initial_vectors, install_tokens, tokenizers_of
from lora_lab.base.protocol import BaseModel, Conditioning
from lora_lab.errors import InputError
from lora_lab.settings.schema import OptimizerTraits, Text
from lora_lab.training.loss import Batch
from lora_lab.training.randomness import generator, seed_of


@dataclass(frozen=True)
class TrainableTextEncoders:
    """The text encoders in training, as a function that encodes the texts of a batch."""

    encoders: dict[str, nn.Module]  # by component: all of them, also where one is trained
    tokens: dict[str, NewTokens]  # by BaseModel.embedding_keys; {} without new tokens
    encode: Callable[[Conditioning], Conditioning]  # BaseModel.encode_tokens

    def __call__(self, batch: Batch) -> Batch:
        """`batch` with encoded texts in place of token ids, with the text encoders' gradients."""
        return replace(batch, conditioning=self.encode(batch.conditioning))


def validate_text(text: Text, adapter: PeftConfig, optimizer: str, traits: OptimizerTraits, start: Path | None) -> None:
    """Raise InputError where the adapter, the optimizer (name and traits) or the LoRA file that training starts from
    (`start`) does not fit the settings of `text`."""
    if text.adapted and (not isinstance(adapter, LoraConfig) or adapter.use_dora or is_pissa(adapter)):
        raise InputError(
            f"text.encoders={text.encoders}: text encoders take LoRA and rsLoRA and no other kind, use adapter=lora "
            "or rslora, or text.encoders=none"
        )
    if text.learns and traits.finds_lr:
        raise InputError(
            f"optimizer={optimizer}: finds one learning rate for all parameters, and the text encoders need their own: "
            "use optimizer=adamw, or text=frozen"
        )
    stored = read_tokens(start) if start else None
    count = len(next(iter(stored[1].values()))) if stored else 0
    if start and count != text.tokens:
        raise InputError(
            f"stage.start_from={start}: has {count} new tokens for its trigger, but this run trains {text.tokens}: "
            f"set text.tokens={count}"
        )
    stops = [key for key, on in (("encoder_stop", text.adapted), ("token_stop", text.tokens)) if on]
    for key in stops:
        if getattr(text, key) < 1 and traits.averages_weights:
            raise InputError(
                f"text.{key}={getattr(text, key)}: {optimizer} saves an average, which goes on changing when the "
                f"rate is 0, use text.{key}=1"
            )


def adapted_text_encoders(base: BaseModel, text: Text) -> list[str]:
    """The names of the text encoders that get a LoRA."""
    names = list(base.text_encoders)
    return [names[i] for i in text.adapted]


def inject_text_adapters(
    base: BaseModel, device: torch.device, text: Text, trigger: str, seed: int, adapter: PeftConfig
) -> TrainableTextEncoders:
    """Inject LoRAs and new tokens into the base's text encoders, which then stay on `device`.

    Raises InputError for tokens that the base's tokenizers have already."""
    for encoder in base.text_encoders.values():
        encoder.to(device)
    for name in adapted_text_encoders(base, text):
        torch.manual_seed(seed_of(seed, "adapter", name))
        base.components[name].add_adapter(text_encoder_config(adapter, base))
    tokens = {}
    if text.tokens:
        vectors = {
            base.embedding_keys[name]: initial_vectors(
                encoder, tokenizer, text.tokens, text.tokens_from, generator(seed, "tokens", name)
            )
            for (name, encoder), tokenizer in zip(base.text_encoders.items(), base.tokenizers, strict=True)
        }
        tokens = install_tokens(base, tokenizers_of(base, trigger, text.tokens), vectors)
    return TrainableTextEncoders(base.text_encoders, tokens, base.encode_tokens)


def text_encoder_config(adapter: LoraConfig, base: BaseModel) -> LoraConfig:
    """The LoRA of a text encoder: the network's rank, scale and dropout; its patterns name the network's layers."""
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        use_rslora=adapter.use_rslora,
        lora_dropout=adapter.lora_dropout,
        init_lora_weights=adapter.init_lora_weights,
        target_modules=list(base.text_targets),
    )


def text_metadata(text: Text, lr: float) -> dict[str, str]:
    """The metadata of a LoRA file about its text encoders, trained beside a network with the learning rate `lr`; {} if
    they are the base's."""
    metadata = {}
    if text.adapted:
        metadata["ss_text_encoder_lr"] = str(lr if text.encoder_lr is None else text.encoder_lr)
    if text.tokens:
        metadata[COUNT] = str(text.tokens)
    return metadata


def describe_text(text: Text, trigger: str, lr: float, steps: int) -> str:
    """What is trained of the text encoders, in the words of the plan that a run prints."""
    lines = []
    if text.adapted:
        rate = lr if text.encoder_lr is None else text.encoder_lr
        which = "both text encoders" if text.encoders == "both" else f"the {text.encoders} text encoder"
        lines.append(f"{which}, lr {rate:g}{_until(text.encoder_stop, steps)}")
    if text.tokens:
        start = f"like {text.tokens_from}" if text.tokens_from else "at random"
        stop = _until(text.token_stop, steps)
        lines.append(f"{text.tokens} new tokens for {trigger}, which begin {start}, lr {text.token_lr:g}{stop}")
    return "; ".join(lines)


def freeze_step(fraction: float, steps: int) -> int:
    """The number of steps after which parameters that train for `fraction` of `steps` are frozen."""
    return max(1, round(fraction * steps))


def _until(fraction: float, steps: int) -> str:
    return f" until step {freeze_step(fraction, steps)}" if fraction < 1 else ""
