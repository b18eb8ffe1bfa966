"""An adapter as training begins: which kinds there are, what they begin with, and beginning with a LoRA file."""

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, set_peft_model_state_dict
from safetensors.torch import load_file

from lora_lab.adapters.attach import lora_attached
from lora_lab.adapters.files import PREFIX, START, describe, kohya_state, peft_state, refuse_unknown
from lora_lab.adapters.tokens import installed_tokens, read_tokens
from lora_lab.errors import InputError

EVERYWHERE = {"_target_", "r", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}
LYCORIS = EVERYWHERE | {"alpha", "rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}
# Of a key that is not here nobody has tried whether a file can hold what it does.
KEYS = {
    LoraConfig: EVERYWHERE | {"lora_alpha", "use_rslora", "use_dora", "lora_dropout", "init_lora_weights"},
    LoHaConfig: LYCORIS,
    LoKrConfig: LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
}
DROPOUTS = ("lora_dropout", "rank_dropout", "module_dropout")


def validate_adapter(config: object, settings: dict[str, object], lora_plus_ratio: float, start: Path | None) -> None:
    """Raise InputError for an adapter that no LoRA file can hold, or that can't be trained as asked.

    `config` is what `settings` (of the group adapter) made, `start` the file that it is to begin with."""
    if type(config) not in KEYS:
        kinds = ", ".join(f"peft.{kind.__name__}" for kind in KEYS)
        raise InputError(f"adapter._target_={settings['_target_']}: a LoRA file can hold {kinds}")
    strange = sorted(settings.keys() - KEYS[type(config)])
    if strange:
        raise InputError(f"adapter.{strange[0]}: a LoRA file cannot hold what this does to {type(config).__name__}")
    if config.r < 1:
        raise InputError(f"adapter.r={config.r}: r must be at least 1")
    if lora_plus_ratio != 1 and not isinstance(config, LoraConfig):
        raise InputError(f"stage.lora_plus_ratio={lora_plus_ratio}: only LoRA and DoRA have the matrix B that it is of")
    if isinstance(config, LoraConfig):
        begins = config.init_lora_weights
        if not (isinstance(begins, bool) or begins == "gaussian" or is_pissa(config)):
            raise InputError(
                f"adapter.init_lora_weights={begins}: one of gaussian, pissa, pissa_niter_NUMBER, true and false"
            )
        if is_pissa(config) and (config.use_dora or start):
            what = "a file to start from" if start else "DoRA"
            raise InputError(
                f"adapter.init_lora_weights={begins}: PiSSA begins with the base's weights, not with {what}"
            )


def is_pissa(config: PeftConfig) -> bool:
    return isinstance(config, LoraConfig) and str(config.init_lora_weights).startswith("pissa")


def inject_adapter(unet: UNet2DConditionModel, config: PeftConfig) -> None:
    """Put a fresh adapter into `unet`; its random numbers come from torch's generator. Raises InputError.

    PiSSA (Meng et al. 2024) begins with B0 A0, the largest singular values of a weight W, and trains B A beside
    W - B0 A0. Here W stays: a second adapter, frozen, takes B0 A0 away. That costs a second pair of small products
    a layer, and base, validation and file stay exact; in peft's way the base would be another while it trains."""
    whole = [(parameter, parameter.data) for parameter in unet.parameters()]
    try:
        unet.add_adapter(config)
        if is_pissa(config):
            for parameter, data in whole:  # peft has put W - B0 A0 there
                parameter.data = data
            unet.add_adapter(_same_shape(config, unet), START)
            _subtract_start(unet)
        refuse_unknown(unet)  # now, instead of after training
    except ValueError as error:
        if is_pissa(config) and "initialization" in str(error):
            raise InputError(
                "adapter.init_lora_weights: PiSSA is for linear layers, say targets=ff or attention"
            ) from error
        raise InputError(f"adapter: {str(error).splitlines()[0][:200]}") from error


def _same_shape(config: LoraConfig, unet: UNet2DConditionModel) -> LoraConfig:
    """A LoRA of the same shapes and scales that drops nothing out."""
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
    )


@torch.no_grad()
def _subtract_start(unet: UNet2DConditionModel) -> None:
    for name, layer in unet.named_modules():
        if START not in getattr(layer, "r", {}):
            continue
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if len(down) < layer.r[START]:
            raise InputError(
                f"adapter.r={layer.r[START]}: PiSSA begins with singular values, of which {name} has {len(down)}"
            )
        layer.lora_A[START].weight.copy_(down)
        layer.lora_B[START].weight.copy_(-up)
    unet.set_adapter(["default", START])
    for name, parameter in unet.named_parameters():
        if f".{START}." in name:
            parameter.requires_grad_(False)


def load_adapter_weights(pipe: StableDiffusionXLPipeline, file: Path) -> None:
    """Let the adapters in `pipe` begin with what a LoRA file holds, and new tokens with the embeddings beside it.

    Raises InputError if that has another shape."""
    parts = {part: getattr(pipe, part) for part in PREFIX if part in pipe.get_list_adapters()}
    mine, theirs = kohya_state(parts), load_file(str(file))
    if not mine.keys() & theirs.keys():
        # Another program's names: what diffusers can load can be read back, rounded to the base's precision.
        with lora_attached(pipe, file):
            found = [part for part, adapters in pipe.get_list_adapters().items() if "attached" in adapters]
            if "unet" not in found or not parts.keys() >= set(found):
                raise InputError(f"stage.start_from={file}: is about the text encoders, which are not trained here")
            theirs = kohya_state({part: parts[part] for part in found}, "attached")
    shapes, wanted = ({k: v.shape for k, v in s.items() if not k.endswith(".alpha")} for s in (theirs, mine))
    differing = [key for key in wanted | shapes if wanted.get(key) != shapes.get(key)]
    if differing:
        raise InputError(
            f"stage.start_from={file}: holds {describe(theirs)}, but this run trains {describe(mine)} "
            f"(the first to differ is {differing[0]}): say the rank, targets and adapter that the file was trained with"
        )
    for part, model in parts.items():
        own = {key: value for key, value in theirs.items() if key.startswith(f"{PREFIX[part]}_")}
        set_peft_model_state_dict(model, peft_state(model, own, part=part))
    if put := installed_tokens(pipe):
        _, vectors = read_tokens(file)  # the plan has seen that there are as many
        with torch.no_grad():
            for key, tokens in put.items():
                tokens.vectors.copy_(vectors[key])
