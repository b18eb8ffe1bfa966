"""Attach a LoRA file to the base within a context: validation, img2img and everything else that samples does so."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    recurse_remove_peft_layers,
    set_weights_and_activate_adapters,
)
from peft import set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab.adapters.keys import adapter_kind, config_from_state, peft_state
from lora_lab.adapters.tokens import read_tokens, tokens_disabled, tokens_installed
from lora_lab.base.load import DTYPES
from lora_lab.base.protocol import BaseModel
from lora_lab.errors import InputError

ATTACHED = "attached"  # peft's name of an adapter from a file


@contextmanager
def lora_attached(base: BaseModel, lora: Path | None, weight: float = 1.0, fuse: bool = False) -> Iterator[None]:
    """Within the context `base` computes with the file's LoRA at `weight`, and reads the trigger as the file's new
    tokens if it has any; adapters in training are disabled.

    The file itself is loaded, also in the middle of training: a validation image is what inference will give.
    With `fuse` the LoRA is added to the network's weights: see _fused_weights.
    Raises InputError if the file is not a LoRA for this base."""
    components = list(base.components.values())
    trainable = [p for component in components for p in component.parameters() if p.requires_grad]
    adapted = [component for component in components if getattr(component, "peft_config", None)] if trainable else []
    active = [component.active_adapters() for component in adapted]
    for component in adapted:
        component.disable_adapters()
    try:
        with tokens_disabled(base), ExitStack() as stack:
            if lora is not None and weight:
                _load_lora(base, lora, weight)
                if tokens := read_tokens(lora):
                    stack.enter_context(tokens_installed(base, *tokens))
            if fuse:
                stack.enter_context(_fused_weights(base.network))
            yield
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


def attached_components(base: BaseModel) -> list[str]:
    """The components that the attached file changes."""
    return [name for name, module in base.components.items() if ATTACHED in getattr(module, "peft_config", ())]


def _load_lora(base: BaseModel, lora: Path, weight: float) -> None:
    try:
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
def _fused_weights(network: nn.Module) -> Iterator[None]:
    """Within the context layers with an attached LoRA compute W x with W = W0 + change, in place of two more products.

    W is a separate tensor, rounded to the base's precision; W0 is restored unchanged. The price is these weights twice,
    1.9 GB in bfloat16 for SDXL's attention. Quantized layers keep their products: nothing can be added to them."""
    replaced: list[tuple[BaseTunerLayer, list[tuple[nn.Parameter, Tensor]]]] = []
    try:
        with torch.no_grad():
            for layer in network.modules():
                if not isinstance(layer, BaseTunerLayer) or ATTACHED not in layer.scaling:
                    continue
                wrapped = layer.get_base_layer()
                if type(wrapped) in (nn.Linear, nn.Conv2d) and wrapped.weight.dtype in DTYPES.values():
                    replaced.append((layer, [(parameter, parameter.data) for parameter in wrapped.parameters()]))
                    for parameter in wrapped.parameters():
                        parameter.data = parameter.data.clone()
                    layer.merge(adapter_names=[ATTACHED])
        yield
    finally:
        for layer, weights in replaced:
            layer.merged_adapters.clear()  # not unmerged: W - (W - W0) is not W0
            for parameter, data in weights:
                parameter.data = data
