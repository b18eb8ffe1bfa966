"""Inject a new adapter into the network: the kinds there are, their initial weights, and starting from a LoRA file."""

from functools import partial
from pathlib import Path

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters.attach import ATTACHED, attached_components, lora_attached
from lora_lab.adapters.keys import START, describe, kohya_state, peft_state, refuse_unknown
from lora_lab.adapters.tokens import installed_tokens, read_tokens
from lora_lab.base.protocol import BaseModel
from lora_lab.errors import InputError

EVERYWHERE = {"_target_", "r", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}
LYCORIS = EVERYWHERE | {"alpha", "rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}
# Only keys whose effect was tried to survive in a file.
KEYS = {
    LoraConfig: EVERYWHERE | {"lora_alpha", "use_rslora", "use_dora", "lora_dropout", "init_lora_weights"},
    LoHaConfig: LYCORIS,
    LoKrConfig: LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
}
DROPOUTS = ("lora_dropout", "rank_dropout", "module_dropout")


def validate_adapter(config: object, settings: dict[str, object], lora_plus_ratio: float, start: Path | None) -> None:
    """Raise InputError for an adapter that no LoRA file can hold, or that cannot be trained with these settings.

    `config` is the peft configuration that `settings` (of the group adapter) describe, `start` the file to start from.
    """
    if type(config) not in KEYS:
        kinds = ", ".join(f"peft.{kind.__name__}" for kind in KEYS)
        raise InputError(f"adapter._target_={settings['_target_']}: a LoRA file can hold {kinds}")
    unknown = sorted(settings.keys() - KEYS[type(config)])
    if unknown:
        raise InputError(f"adapter.{unknown[0]}: a LoRA file cannot hold what this does to {type(config).__name__}")
    if config.r < 1:
        raise InputError(f"adapter.r={config.r}: r must be at least 1")
    if lora_plus_ratio != 1 and not isinstance(config, LoraConfig):
        raise InputError(
            f"stage.lora_plus_ratio={lora_plus_ratio}: it is a ratio of the B matrices, which only LoRA and DoRA have"
        )
    if isinstance(config, LoraConfig):
        initialization = config.init_lora_weights
        if not (isinstance(initialization, bool) or initialization == "gaussian" or is_pissa(config)):
            raise InputError(
                f"adapter.init_lora_weights={initialization}: one of gaussian, pissa, pissa_niter_NUMBER, true and "
                "false"
            )
        if is_pissa(config) and (config.use_dora or start):
            what = "a file to start from" if start else "DoRA"
            raise InputError(
                f"adapter.init_lora_weights={initialization}: PiSSA starts from the base's weights, not with {what}"
            )


def is_pissa(config: PeftConfig) -> bool:
    """Whether the adapter starts from singular vectors of the base's weights."""
    return isinstance(config, LoraConfig) and str(config.init_lora_weights).startswith("pissa")


def inject_adapter(network: nn.Module, config: PeftConfig) -> None:
    """Put a new adapter into `network`; its random numbers come from torch's generator.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) starts from B0 A0, the largest singular values of a weight W, and trains
    B A beside W - B0 A0. Here W is unchanged: a second, frozen adapter subtracts B0 A0. The price is a second pair of
    small products per layer; base, validation and file stay exact, while peft's way changes the base during training.
    Raises InputError for an adapter that does not fit the network."""
    weights = [(parameter, parameter.data) for parameter in network.parameters()]
    try:
        network.add_adapter(config)
        if is_pissa(config):
            for parameter, data in weights:  # peft has replaced it by W - B0 A0
                parameter.data = data
            network.add_adapter(_same_shape(config), START)
            _subtract_start(network)
        refuse_unknown(network)  # now, not after training
    except ValueError as error:
        if is_pissa(config) and "initialization" in str(error):
            raise InputError(
                "adapter.init_lora_weights: PiSSA is for linear layers, use targets=ff or attention"
            ) from error
        raise InputError(f"adapter: {str(error).splitlines()[0][:200]}") from error


def _same_shape(config: LoraConfig) -> LoraConfig:
    """A LoRA of the same shapes and scales without dropout."""
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
def _subtract_start(network: nn.Module) -> None:
    for name, layer in network.named_modules():
        if START not in getattr(layer, "r", {}):
            continue
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if len(down) < layer.r[START]:
            raise InputError(
                f"adapter.r={layer.r[START]}: PiSSA starts from singular values, of which {name} has {len(down)}"
            )
        layer.lora_A[START].weight.copy_(down)
        layer.lora_B[START].weight.copy_(-up)
    network.set_adapter(["default", START])
    for name, parameter in network.named_parameters():
        if f".{START}." in name:
            parameter.requires_grad_(False)


def load_adapter_weights(base: BaseModel, file: Path) -> None:
    """Load a LoRA file into the base's adapters in training, and the embeddings beside it into their new tokens.

    Raises InputError if the file has other shapes than the adapters."""
    adapted = {name: module for name, module in base.components.items() if getattr(module, "peft_config", None)}
    current, loaded = kohya_state(adapted, base.lora_key), load_file(str(file))
    if not current.keys() & loaded.keys():
        # Another program's keys: what the base's library can load is read back, rounded to the base's precision.
        with lora_attached(base, file):
            names = attached_components(base)
            if base.network_name not in names or not adapted.keys() >= set(names):
                raise InputError(f"stage.start_from={file}: is about the text encoders, which are not trained here")
            loaded = kohya_state({name: adapted[name] for name in names}, base.lora_key, ATTACHED)
    shapes, expected = (
        {key: value.shape for key, value in state.items() if not key.endswith(".alpha")} for state in (loaded, current)
    )
    differing = [key for key in expected | shapes if expected.get(key) != shapes.get(key)]
    if differing:
        raise InputError(
            f"stage.start_from={file}: holds {describe(loaded)}, but this run trains {describe(current)} "
            f"(the first to differ is {differing[0]}): set the rank, targets and adapter that the file was trained with"
        )
    for name, module in adapted.items():
        key_of = partial(base.lora_key, name)
        stems = {key_of(layer) for layer, _ in module.named_modules()}
        state = {key: value for key, value in loaded.items() if key.partition(".")[0] in stems}
        set_peft_model_state_dict(module, peft_state(module, state, key_of))
    if installed := installed_tokens(base):
        _, vectors = read_tokens(file)  # validate_text has checked that there are as many
        with torch.no_grad():
            for key, tokens in installed.items():
                tokens.vectors.copy_(vectors[key])
