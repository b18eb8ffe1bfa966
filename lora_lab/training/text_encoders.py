"""What learns of the text: LoRAs on the text encoders, and new tokens for the trigger. Then captions are not encoded
beforehand: a batch has token ids, and the encoders run inside the step."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, PeftConfig
from torch import nn

from lora_lab.adapters.inject import is_pissa
from lora_lab.adapters.tokens import COUNT, KEYS, NewTokens, initial_vectors, install_tokens, read_tokens, tokenizers_of
from lora_lab.base.encode import encode_ids
from lora_lab.errors import InputError
from lora_lab.settings.schema import Config
from lora_lab.training.loss import Batch
from lora_lab.training.randomness import generator, seed_of

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]  # diffusers reads no file that lacks one of them


@dataclass(frozen=True)
class TrainableTextEncoders:
    """The text encoders in training, as a function that encodes the texts of a batch."""

    encoders: dict[str, nn.Module]  # by their names in the pipeline: both, also if only one of them learns
    tokens: dict[str, NewTokens]  # clip_l and clip_g; {} without new tokens

    def __call__(self, batch: Batch) -> Batch:
        """`batch` with `tokens` and `pooled` in place of `ids`: zeros where no text is given."""
        tokens, pooled = encode_ids(list(self.encoders.values()), batch.ids)
        dropped = ~batch.given
        return replace(
            batch,
            tokens=tokens.masked_fill(dropped[:, None, None], 0),
            pooled=pooled.masked_fill(dropped[:, None], 0),
        )


def validate_text(config: Config, adapter: PeftConfig, probe: torch.optim.Optimizer, start: Path | None) -> None:
    """Raise InputError where the adapter, the optimizer (`probe`, of one number) or the file that training begins with
    (`start`) does not fit what text asks."""
    text, name = config.text, type(probe).__name__
    if text.adapted and (not isinstance(adapter, LoraConfig) or adapter.use_dora or is_pissa(adapter)):
        raise InputError(
            f"text.encoders={text.encoders}: text encoders take LoRA and rsLoRA and no other kind, say adapter=lora "
            "or rslora, or text.encoders=none"
        )
    if text.learns and "d" in probe.param_groups[0]:
        raise InputError(
            f"optimizer={name}: finds one learning rate for all that learns, and text needs its own: "
            "say optimizer=adamw, or text=frozen"
        )
    begun = read_tokens(start) if start else None
    count = len(begun[1]["clip_l"]) if begun else 0
    if start and count != text.tokens:
        raise InputError(
            f"stage.start_from={start}: has {count} new tokens for its trigger, but this run trains {text.tokens}: "
            f"say text.tokens={count}"
        )
    stops = [key for key, on in (("encoder_stop", text.adapted), ("token_stop", text.tokens)) if on]
    for key in stops:
        if getattr(text, key) < 1 and hasattr(probe, "eval"):
            raise InputError(
                f"text.{key}={getattr(text, key)}: what {name} saves is an average that moves on when the rate is 0, "
                f"say text.{key}=1"
            )


def inject_text_adapters(
    pipe: StableDiffusionXLPipeline, device: torch.device, config: Config, adapter: PeftConfig
) -> TrainableTextEncoders | None:
    """Put what learns of the text into the pipeline's text encoders, which stay on `device`; None if nothing does."""
    text = config.text
    if not text.learns:
        return None
    for part in KEYS:
        getattr(pipe, part).to(device)
    for part in text.adapted:
        torch.manual_seed(seed_of(config.seed, "adapter", part))
        getattr(pipe, part).add_adapter(text_encoder_config(adapter))
    tokens = {}
    if text.tokens:
        vectors = {
            key: initial_vectors(
                getattr(pipe, part), tokenizer, text.tokens, text.tokens_from, generator(config.seed, "tokens", part)
            )
            for (part, key), tokenizer in zip(KEYS.items(), (pipe.tokenizer, pipe.tokenizer_2), strict=True)
        }
        tokens = install_tokens(pipe, tokenizers_of(pipe, config.trigger, text.tokens), vectors)
    return TrainableTextEncoders({part: getattr(pipe, part) for part in KEYS}, tokens)


def text_encoder_config(adapter: LoraConfig) -> LoraConfig:
    """The LoRA of a text encoder: rank, scale and dropout of the UNet's; its patterns name the UNet's layers."""
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        use_rslora=adapter.use_rslora,
        lora_dropout=adapter.lora_dropout,
        init_lora_weights=adapter.init_lora_weights,
        target_modules=TARGETS,
    )


def text_metadata(config: Config) -> dict[str, str]:
    """The metadata of a LoRA file about its text side; {} if that is the base's."""
    text, notes = config.text, {}
    if text.adapted:
        notes["ss_text_encoder_lr"] = str(config.rate if text.encoder_lr is None else text.encoder_lr)
    if text.tokens:
        notes[COUNT] = str(text.tokens)
    return notes


def describe_text(config: Config) -> str:
    """What learns of the text, as a person reads it before the run."""
    text, said = config.text, []
    if text.adapted:
        rate = config.rate if text.encoder_lr is None else text.encoder_lr
        which = "both text encoders" if text.encoders == "both" else f"the {text.encoders} text encoder"
        said.append(f"{which}, lr {rate:g}{_until(text.encoder_stop, config.steps)}")
    if text.tokens:
        begin = f"like {text.tokens_from}" if text.tokens_from else "at random"
        stop = _until(text.token_stop, config.steps)
        said.append(f"{text.tokens} new tokens for {config.trigger}, which begin {begin}, lr {text.token_lr:g}{stop}")
    return "; ".join(said)


def freeze_step(share: float, steps: int) -> int:
    """The steps that a part learns for."""
    return max(1, round(share * steps))


def _until(share: float, steps: int) -> str:
    return f" until step {freeze_step(share, steps)}" if share < 1 else ""
