"""Adapters in the network: inject a new one to train it, or attach a LoRA file to sample with it."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    recurse_remove_peft_layers,
    set_weights_and_activate_adapters,
)
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab.adapters.files import (
    START,
    adapter_kind,
    config_from_state,
    describe,
    kohya_state,
    peft_state,
    read_tokens,
    refuse_unknown,
)
from lora_lab.adapters.tokens import installed_tokens, tokens_disabled, tokens_installed
from lora_lab.base.load import DTYPES
from lora_lab.base.protocol import BaseModel
from lora_lab.errors import InputError
from lora_lab.runs import signals_deferred

EVERYWHERE = {"_target_", "r", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}
LYCORIS = EVERYWHERE | {"alpha", "rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}
# Only keys whose effect was tried to survive in a file.
KEYS = {
    LoraConfig: EVERYWHERE | {"lora_alpha", "use_rslora", "use_dora", "lora_dropout", "init_lora_weights"},
    LoHaConfig: LYCORIS,
    LoKrConfig: LYCORIS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
}
DROPOUTS = ("lora_dropout", "rank_dropout", "module_dropout")
ATTACHED = "attached"  # peft's name of an adapter from a file


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


class AttachedLoRA:
    """A LoRA file on the base, within `lora_attached`: its weight can be changed between two images, or two steps.

    A CUDA graph would hold a layer's scale, a number, as a constant. On a GPU the scales of the network therefore
    become elements of one tensor with the first change, which must come before the capture; later changes reach the
    graph."""

    def __init__(self, base: BaseModel, merged: "Merged") -> None:
        self.components = attached_components(base)  # the names of those that the file changes
        self._layers = [layer for name in self.components for layer in _attached_layers(base.components[name])]
        self._captured = _attached_layers(base.network)
        self._merged = merged
        self._scales: Tensor | None = None  # (len(self._captured),) float32, on a GPU

    def set_weight(self, weight: float) -> None:
        """Scale the LoRA as `lora_attached` with `weight` does."""
        for layer in self._layers:
            layer.set_scale(ATTACHED, weight)
        device = next((parameter.device for layer in self._captured for parameter in layer.parameters()), None)
        if device is not None and device.type == "cuda":
            values = torch.tensor([layer.scaling[ATTACHED] for layer in self._captured])
            self._scales = values.to(device) if self._scales is None else self._scales.copy_(values)
            for layer, scale in zip(self._captured, self._scales, strict=True):
                layer.scaling[ATTACHED] = scale
        _merge(self._merged)


def _attached_layers(component: nn.Module) -> list[BaseTunerLayer]:
    layers = (layer for layer in component.modules() if isinstance(layer, BaseTunerLayer))
    return [layer for layer in layers if ATTACHED in layer.scaling]


@contextmanager
def lora_attached(
    base: BaseModel, lora: Path | None, weight: float = 1.0, fuse: bool = False
) -> Iterator[AttachedLoRA]:
    """Within the context `base` computes with the file's LoRA at `weight`, and reads the trigger as the file's new
    tokens if it has any; adapters in training are disabled.

    The weights are read from the file, also in the middle of training, so a validation image shows what inference will
    give. With `fuse` the LoRA is added to the network's weights: see _fused_weights.
    Raises InputError if the file is not a LoRA for this base."""
    components = list(base.components.values())
    trainable = [p for component in components for p in component.parameters() if p.requires_grad]
    adapted = [component for component in components if getattr(component, "peft_config", None)] if trainable else []
    active = [component.active_adapters() for component in adapted]
    for component in adapted:
        component.disable_adapters()
    try:
        with _tables_of(base), ExitStack() as stack:
            if lora is not None and weight:
                _load_lora(base, lora, weight)
                if tokens := read_tokens(lora):
                    stack.enter_context(tokens_installed(base, *tokens))
            merged = stack.enter_context(_fused_weights(base.network)) if fuse else []
            yield AttachedLoRA(base, merged)
    finally:
        if trainable:
            _delete_attached(components)
            for component, names in zip(adapted, active, strict=True):
                component.enable_adapters()
                component.set_adapter(names)  # sets requires_grad for all of these
            for component in components:
                component.requires_grad_(False)
            for parameter in trainable:
                parameter.requires_grad_(True)
        elif lora is not None and weight:
            _unwrap(components)


def _tables_of(base: BaseModel) -> AbstractContextManager[None]:
    """A context within which the text encoders have only the base's embedding tables."""
    tables = [encoder.get_input_embeddings() for encoder in base.text_encoders.values()]
    return nullcontext() if all(type(table) is nn.Embedding for table in tables) else tokens_disabled(base)


def attached_components(base: BaseModel) -> list[str]:
    """The components that the attached file changes."""
    return [name for name, module in base.components.items() if ATTACHED in getattr(module, "peft_config", ())]


def _load_lora(base: BaseModel, lora: Path, weight: float) -> None:
    try:
        with signals_deferred():
            with safe_open(str(lora), "pt") as file:
                kind = adapter_kind(file.keys())
            if kind == "LoRA":
                base.load_lora(lora, ATTACHED)
            else:  # diffusers refuses LoHa and LoKr, and reads DoRA without its magnitudes
                load_own_keys(base, base.network_name, lora, ATTACHED)
        names = attached_components(base)
        if not names:
            raise ValueError("it has no key of this base")
        for component in base.components.values():
            set_weights_and_activate_adapters(component, [ATTACHED], [weight])
    except Exception as error:  # for a file that does not fit, diffusers and peft raise nearly anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{lora}: does not fit this base as a LoRA ({' '.join(lines[:2])[:200]})") from error
    for name in names:
        base.components[name].enable_adapters()


def load_own_keys(base: BaseModel, component: str, file: Path, adapter: str) -> None:
    """Put a file of this package's keys into a new adapter of one component, whatever kind it is.

    Raises ValueError for a key that the component has no module for."""
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata() or {}
    state, model, key_of = load_file(str(file)), base.components[component], partial(base.lora_key, component)
    factor = int(json.loads(metadata.get("ss_network_args", "{}")).get("factor", -1))
    model.add_adapter(config_from_state(model, state, key_of, factor), adapter)
    model.requires_grad_(False)
    set_peft_model_state_dict(model, peft_state(model, state, key_of, adapter), adapter)


# The layers that compute with merged weights, and each parameter with the base's data.
Merged = list[tuple[BaseTunerLayer, list[tuple[nn.Parameter, Tensor]]]]


@contextmanager
def _fused_weights(network: nn.Module) -> Iterator[Merged]:
    """Within the context layers with an attached LoRA compute W x with W = W0 + change, in place of two more products.

    W is a separate tensor, rounded to the base's precision; W0 is restored unchanged. The price is these weights twice,
    1.9 GB in bfloat16 for SDXL's attention. Quantized layers keep their products: nothing can be added to them."""
    replaced: Merged = []
    try:
        with torch.no_grad():
            for layer in _attached_layers(network):
                wrapped = layer.get_base_layer()
                if type(wrapped) in (nn.Linear, nn.Conv2d) and wrapped.weight.dtype in DTYPES.values():
                    replaced.append((layer, [(parameter, parameter.data) for parameter in wrapped.parameters()]))
                    for parameter in wrapped.parameters():
                        parameter.data = torch.empty_like(parameter.data)
        _merge(replaced)
        yield replaced
    finally:
        for layer, weights in replaced:
            layer.merged_adapters.clear()  # not unmerged: W - (W - W0) is not W0
            for parameter, data in weights:
                parameter.data = data


@torch.no_grad()
def _merge(layers: Merged) -> None:
    """Write W0 + change into each parameter, which keeps its address: a CUDA graph may read it."""
    for layer, parameters in layers:
        places = [parameter.data for parameter, _ in parameters]
        for place, (_, weights) in zip(places, parameters, strict=True):
            place.copy_(weights)
        layer.merged_adapters.clear()
        layer.merge(adapter_names=[ATTACHED])
        for place, (parameter, _) in zip(places, parameters, strict=True):
            if parameter.data_ptr() != place.data_ptr():  # DoRA puts a new tensor in its place
                place.copy_(parameter.data)
                parameter.data = place


def _delete_attached(components: list[nn.Module]) -> None:
    for component in components:
        delete_adapter_layers(component, ATTACHED)
        if hasattr(component, "peft_config"):
            component.peft_config.pop(ATTACHED, None)


def _unwrap(components: list[nn.Module]) -> None:
    """Replace peft's layers by the layers that they wrap, as diffusers' unload_lora_weights does."""
    for component in components:
        recurse_remove_peft_layers(component)
        if hasattr(component, "peft_config"):
            del component.peft_config
        if hasattr(component, "_hf_peft_config_loaded"):
            component._hf_peft_config_loaded = None


@contextmanager
def adapters_disabled(*networks: nn.Module) -> Iterator[None]:
    """Within the context `networks` compute as without adapters, in the middle of a training step.

    The switches of peft and diffusers also set requires_grad: they would freeze the adapter in training, and train the
    frozen one of PiSSA."""
    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
