"""The tensors of a LoRA file in kohya's keys, which diffusers, ComfyUI, AUTOMATIC1111, Forge and kohya's tools load.

LoHa and LoKr have LyCORIS's keys, and DoRA its magnitudes: docs/lora-file.md says which programs read those. A file's
key is `base.lora_key(component, module)`, a dot, and the name of a tensor (a leaf)."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model_state_dict
from torch import Tensor, nn

from lora_lab.errors import InputError

LEAVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LEAVES |= {leaf: leaf for leaf in (*HADAMARD, *KRONECKER)}
SCALED = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")  # the tensor of a layer that a change of scale goes to
START = "start"  # the frozen adapter that subtracts a PiSSA adapter's initial product: adapters/inject.py

ComponentKey = Callable[[str, str], str]  # base.lora_key: (component, module) -> name in a file


def kohya_state(
    components: Mapping[str, nn.Module],
    lora_key: ComponentKey,
    adapter: str = "default",
    values: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of `adapter` in `components` (by name) as a file has them, on the CPU: for a linear layer (O, I) and
    rank R these are lora_down.weight (R, I), lora_up.weight (O, R) and alpha ().

    `values` has exact parameters, of the same shapes, by component.name, where those in the modules are rounded.

    alpha is scaling * r, so alpha != rank and rsLoRA come out right: readers compute scaling as alpha / r. Each
    component's LoRA has one alpha, since diffusers drops differing ones; where a pattern sets others, the up matrices
    are scaled. Raises InputError for parameters that the format cannot hold (biases)."""
    state = {}
    for component, model in components.items():
        common = None
        parameters = _adapter_parameters(model, adapter)
        if values is not None:
            parameters = {name: values[f"{component}.{name}"] for name in parameters}
        for module, leaves in _by_module(model, adapter, parameters).items():
            layer = model.get_submodule(module)
            scaling, rank = layer.scaling[adapter], layer.r[adapter]
            if "lora_up.weight" in leaves:
                if START in layer.r and adapter == "default":
                    leaves, rank = _difference_from_start(leaves, layer), 2 * rank
                common = common or float(scaling * rank)
                alpha, factor = common, scaling * rank / common
            elif {"lokr_w1", "lokr_w2"} <= leaves.keys():
                alpha, factor = float(rank), scaling  # readers take two whole factors without a scale
            else:
                alpha, factor = float(scaling * rank), 1.0
            key = lora_key(component, module)
            for leaf, value in leaves.items():
                value = value * factor if leaf in SCALED and factor != 1 else value
                state[f"{key}.{leaf}"] = value.detach().cpu().contiguous()
            state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def refuse_unknown(model: nn.Module) -> None:
    """Raise InputError for an adapter in `model` that kohya_state cannot write."""
    _by_module(model, "default", _adapter_parameters(model, "default"))


def _adapter_parameters(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if f".{adapter}" in name}


def _by_module(model: nn.Module, adapter: str, parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module name to its adapter's tensors, by their leaves; `parameters` are these by their names in `model`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in get_peft_model_state_dict(model, parameters, adapter).items():
        leaf = next((leaf for leaf in LEAVES if key.endswith(f".{leaf}")), None)
        if leaf is None:
            raise InputError(f"adapter: {key} has no place in a LoRA file, only an adapter's matrices do: conf/adapter")
        if leaf == "lora_magnitude_vector":  # one number per output, with the axes of the weight as LyCORIS has it
            value = value.reshape(-1, *[1] * (model.get_submodule(key.removesuffix(f".{leaf}")).weight.ndim - 1))
        layers.setdefault(key.removesuffix(f".{leaf}"), {})[LEAVES[leaf]] = value
    return layers


def _difference_from_start(leaves: dict[str, Tensor], layer: nn.Module) -> dict[str, Tensor]:
    """B A - B0 A0 as one LoRA of twice the rank: (B - B0) A + B0 (A - A0). In either product one factor is small, so
    rounding to half precision changes the difference no more than it changes any LoRA."""
    down, up = leaves["lora_down.weight"].float(), leaves["lora_up.weight"].float()
    first_down, first_up = layer.lora_A[START].weight.to(down), -layer.lora_B[START].weight.to(up)
    return {
        "lora_down.weight": torch.cat([down, down - first_down]),
        "lora_up.weight": torch.cat([up - first_up, first_up], dim=1),
    }


def peft_state(
    model: nn.Module, state: dict[str, Tensor], key_of: Callable[[str], str], adapter: str = "default"
) -> dict[str, Tensor]:
    """The inverse of kohya_state: what set_peft_model_state_dict puts into `adapter` of `model`. `key_of` gives
    a module's name in the file.

    Shapes are those of the file, with the parameters' names in peft. The adapter may have another alpha than the file:
    the product stays that of the file. Raises ValueError for a key
    that `model` has no module for."""
    peft_leaves = {leaf: peft_leaf for peft_leaf, leaf in LEAVES.items()}
    tensors = {}
    for module, leaves in layers_of(model, state, key_of).items():
        layer, alpha = model.get_submodule(module), leaves.pop("alpha")
        rank = rank_of(leaves)
        factor = (alpha.item() / rank if rank else 1.0) / layer.scaling[adapter]
        for leaf, value in leaves.items():
            value = value * factor if leaf in SCALED and factor != 1 else value
            if leaf == "dora_scale":
                value = value.reshape(layer.lora_magnitude_vector[adapter].weight.shape)
            tensors[f"{module}.{peft_leaves[leaf]}"] = value
    return tensors


def layers_of(model: nn.Module, state: dict[str, Tensor], key_of: Callable[[str], str]) -> dict[str, dict[str, Tensor]]:
    """Module name in `model` to its tensors in a file (shapes as in kohya_state), by leaf.

    Raises ValueError for a key that `model` has no module for."""
    modules = {key_of(name): name for name, _ in model.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, leaf = key.partition(".")
        if stem not in modules or leaf not in (*LEAVES.values(), "alpha"):
            raise ValueError(f"this base has no place for {key}")
        layers.setdefault(modules[stem], {})[leaf] = value
    for leaves in layers.values():
        rank = rank_of(leaves)
        leaves.setdefault("alpha", torch.tensor(float(rank or 1)))
    return layers


def rank_of(leaves: dict[str, Tensor]) -> int | None:
    """The rank R of a layer's tensors, such as lora_down.weight (R, I); None where LoKr's factors are whole."""
    inner = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((leaves[leaf].shape[0] for leaf in inner if leaf in leaves), None)


def config_from_state(
    model: nn.Module, state: dict[str, Tensor], key_of: Callable[[str], str], factor: int
) -> PeftConfig:
    """The peft configuration whose adapter of `model` has the shapes and scales of `state`.

    `factor` is LoKr's decompose_factor, which shapes do not tell. Raises ValueError for a key that `model` has no
    module for."""
    layers = layers_of(model, state, key_of)
    whole = {m: max(t["lokr_w1"].shape + t["lokr_w2"].shape) for m, t in layers.items() if not rank_of(t)}
    ranks = {module: whole.get(module) or rank_of(tensors) for module, tensors in layers.items()}
    alphas = {module: whole.get(module) or tensors["alpha"].item() for module, tensors in layers.items()}
    leaves = {leaf for tensors in layers.values() for leaf in tensors}
    common = {
        "target_modules": "|".join(map(re.escape, layers)),
        "rank_pattern": _pattern(ranks),
        "alpha_pattern": _pattern(alphas),
    }
    if leaves & set(HADAMARD):
        return LoHaConfig(use_effective_conv2d="hada_t1" in leaves, **common)
    if leaves & set(KRONECKER):
        return LoKrConfig(
            use_effective_conv2d="lokr_t2" in leaves,
            decompose_both="lokr_w1_a" in leaves,
            decompose_factor=factor,
            **common,
        )
    return LoraConfig(use_dora="dora_scale" in leaves, **common)


def _pattern(values: dict[str, float]) -> dict[str, float]:
    """One regular expression for all modules of a value: peft tries every pattern on every module."""
    modules: dict[float, list[str]] = {}
    for module, value in values.items():
        modules.setdefault(value, []).append(re.escape(module))
    return {"|".join(names): value for value, names in modules.items()}


def adapter_kind(keys: Iterable[str]) -> str:
    """What a file with these keys holds: LoRA, DoRA, LoHa or LoKr."""
    leaves = {key.partition(".")[2] for key in keys}
    if leaves & set(HADAMARD):
        return "LoHa"
    return "LoKr" if leaves & set(KRONECKER) else "DoRA" if "dora_scale" in leaves else "LoRA"


def by_layer(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each layer by leaf, with their shapes in the file."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, leaf = key.partition(".")
        layers.setdefault(stem, {})[leaf] = value
    return list(layers.values())


def describe(state: dict[str, Tensor]) -> str:
    """'LoRA of rank 4 in 32 layers', by the shapes of `state` in a file."""
    layers = by_layer(state)
    ranks = sorted({rank for leaves in layers if (rank := rank_of(leaves))})
    rank = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
    return f"{adapter_kind(state)}{rank} in {len(layers)} layers"
