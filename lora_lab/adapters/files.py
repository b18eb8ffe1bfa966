"""The LoRA file: kohya's keys, which diffusers, ComfyUI, AUTOMATIC1111, Forge and kohya's tools all load.

LoHa and LoKr have LyCORIS's keys in it, and DoRA its magnitudes: docs/lora-file.md says who reads those."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab.errors import InputError
from lora_lab.runs import write_atomically
from lora_lab.settings.schema import Loss

PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
LEAVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}
HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LEAVES |= {leaf: leaf for leaf in (*HADAMARD, *KRONECKER)}
SCALED = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")  # the tensor of a layer that takes a change of scale
START = "start"  # the frozen adapter that takes away what a PiSSA adapter began with: adapters/fresh.py


def kohya_state(
    parts: dict[str, nn.Module], adapter: str = "default", learnt: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The adapter of `parts` ("unet", "text_encoder", "text_encoder_2" -> module with it) in kohya's keys.

    `learnt` has its numbers by part and name, where those in the modules are rounded.

    alpha is scaling * r, so alpha != rank and rsLoRA come out right: readers compute scaling as alpha / r.
    Each LoRA part has one alpha, since diffusers drops differing ones; where a pattern sets more, the up matrices take
    it. transformers 5 dropped "text_model." from the first encoder's names; every other program expects it.
    Raises InputError for what the format does not know (biases)."""
    state = {}
    for part, model in parts.items():
        common = None
        own = _own(model, adapter)
        if learnt is not None:
            own = {name: learnt[f"{part}.{name}"] for name in own}
        for module, leaves in _layers(model, adapter, own).items():
            layer = model.get_submodule(module)
            scaling, rank = layer.scaling[adapter], layer.r[adapter]
            if "lora_up.weight" in leaves:
                if START in layer.r and adapter == "default":
                    leaves, rank = _difference_from_start(leaves, layer), 2 * rank
                common = common or float(scaling * rank)
                alpha, left = common, scaling * rank / common
            elif {"lokr_w1", "lokr_w2"} <= leaves.keys():
                alpha, left = float(rank), scaling  # readers take two whole factors without a scale
            else:
                alpha, left = float(scaling * rank), 1.0
            name = _name(part, module)
            for leaf, value in leaves.items():
                value = value * left if leaf in SCALED and left != 1 else value
                state[f"{name}.{leaf}"] = value.detach().cpu().contiguous()
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def refuse_unknown(model: nn.Module) -> None:
    """Raise InputError for an adapter in `model` that kohya_state does not know."""
    _layers(model, "default", _own(model, "default"))


def _own(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if f".{adapter}" in name}


def _name(part: str, module: str) -> str:
    """What a file calls a module of a part of the pipeline."""
    if part != "unet" and not module.startswith("text_model."):
        module = "text_model." + module
    return f"{PREFIX[part]}_{module.replace('.', '_')}"


def _layers(model: nn.Module, adapter: str, own: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module name to its adapter's tensors, by their names in the file; `own` are these by their names in `model`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in get_peft_model_state_dict(model, own, adapter).items():
        leaf = next((leaf for leaf in LEAVES if key.endswith(f".{leaf}")), None)
        if leaf is None:
            raise InputError(f"adapter: {key} has no place in a LoRA file, only an adapter's matrices do: conf/adapter")
        if leaf == "lora_magnitude_vector":  # one number an output, beside the axes of the weight as LyCORIS has it
            value = value.reshape(-1, *[1] * (model.get_submodule(key.removesuffix(f".{leaf}")).weight.ndim - 1))
        layers.setdefault(key.removesuffix(f".{leaf}"), {})[LEAVES[leaf]] = value
    return layers


def _difference_from_start(leaves: dict[str, Tensor], layer: nn.Module) -> dict[str, Tensor]:
    """B A - B0 A0 as one LoRA of twice the rank: (B - B0) A + B0 (A - A0). In either product one factor is small, so
    that rounding to half precision costs the difference no more than it costs any LoRA."""
    down, up = leaves["lora_down.weight"].float(), leaves["lora_up.weight"].float()
    first_down, first_up = layer.lora_A[START].weight.to(down), -layer.lora_B[START].weight.to(up)
    return {
        "lora_down.weight": torch.cat([down, down - first_down]),
        "lora_up.weight": torch.cat([up - first_up, first_up], dim=1),
    }


def peft_state(
    model: nn.Module, state: dict[str, Tensor], adapter: str = "default", part: str = "unet"
) -> dict[str, Tensor]:
    """kohya_state backwards: what set_peft_model_state_dict puts into `adapter` of `model`, a part of the pipeline.

    The adapter may have another alpha than the file: the product stays what the file says."""
    theirs = {leaf: ours for ours, leaf in LEAVES.items()}
    tensors = {}
    for module, leaves in layers_of(model, state, part).items():
        layer, alpha = model.get_submodule(module), leaves.pop("alpha")
        rank = rank_of(leaves)
        left = (alpha.item() / rank if rank else 1.0) / layer.scaling[adapter]
        for leaf, value in leaves.items():
            value = value * left if leaf in SCALED and left != 1 else value
            if leaf == "dora_scale":
                value = value.reshape(layer.lora_magnitude_vector[adapter].weight.shape)
            tensors[f"{module}.{theirs[leaf]}"] = value
    return tensors


def layers_of(model: nn.Module, state: dict[str, Tensor], part: str = "unet") -> dict[str, dict[str, Tensor]]:
    """Module name in `model`, a part of the pipeline, to its tensors in a file. Raises ValueError for one that `model`
    has not."""
    names = {_name(part, name): name for name, _ in model.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, leaf = key.partition(".")
        if stem not in names or leaf not in (*LEAVES.values(), "alpha"):
            raise ValueError(f"the {part} of this base has no place for {key}".replace("unet", "UNet"))
        layers.setdefault(names[stem], {})[leaf] = value
    for leaves in layers.values():
        rank = rank_of(leaves)
        leaves.setdefault("alpha", torch.tensor(float(rank or 1)))
    return layers


def rank_of(leaves: dict[str, Tensor]) -> int | None:
    """The inner dimension of a layer's tensors; None where LoKr's factors are whole."""
    inner = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((leaves[leaf].shape[0] for leaf in inner if leaf in leaves), None)


def config_from_state(model: nn.Module, state: dict[str, Tensor], factor: int) -> PeftConfig:
    """The peft configuration whose adapter of `model` has the shapes and scales of `state`: DoRA, LoHa or LoKr.

    `factor` is the one number that LoKr's shapes do not tell (decompose_factor)."""
    layers = layers_of(model, state)
    whole = {m: max(t["lokr_w1"].shape + t["lokr_w2"].shape) for m, t in layers.items() if not rank_of(t)}
    ranks = {module: whole.get(module) or rank_of(tensors) for module, tensors in layers.items()}
    alphas = {module: whole.get(module) or tensors["alpha"].item() for module, tensors in layers.items()}
    leaves = {leaf for tensors in layers.values() for leaf in tensors}
    common = {
        "target_modules": "|".join(map(re.escape, layers)),
        "rank_pattern": _pattern(ranks),
        "alpha_pattern": _pattern(alphas),
    }
    if "dora_scale" in leaves:
        return LoraConfig(use_dora=True, **common)
    if leaves & set(HADAMARD):
        return LoHaConfig(use_effective_conv2d="hada_t1" in leaves, **common)
    return LoKrConfig(
        use_effective_conv2d="lokr_t2" in leaves,
        decompose_both="lokr_w1_a" in leaves,
        decompose_factor=factor,
        **common,
    )


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


def describe(state: dict[str, Tensor]) -> str:
    """'LoRA of rank 4 in 32 layers'."""
    layers = _by_layer(state)
    ranks = sorted({rank for leaves in layers if (rank := rank_of(leaves))})
    rank = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
    return f"{adapter_kind(state)}{rank} in {len(layers)} layers"


def network_metadata(config: PeftConfig, state: dict[str, Tensor], lora_plus_ratio: float) -> dict[str, str]:
    """The metadata that says what kind of adapter `state` is, in the words of kohya's scripts and of LyCORIS."""
    kind, layers = adapter_kind(state), _by_layer(state)
    ranked = [leaves for leaves in layers if rank_of(leaves)]
    ranks = {rank_of(leaves) for leaves in ranked} or {config.r}
    alphas = {leaves["alpha"].item() for leaves in ranked} or {float(config.r)}
    dim, alpha = (str(found.pop()) if len(found) == 1 else "Dynamic" for found in (ranks, alphas))
    args: dict[str, object] = {}
    if kind == "DoRA":
        args = {"algo": "lora", "dora_wd": True, "wd_on_output": True}
    elif kind != "LoRA":
        args = {"algo": kind.lower(), "use_tucker": config.use_effective_conv2d}
    if kind == "LoKr":
        args |= {"factor": config.decompose_factor, "decompose_both": config.decompose_both}
    if any(value.ndim == 4 for value in state.values()):
        args |= {"conv_dim": dim, "conv_alpha": alpha}
    if lora_plus_ratio != 1:
        args["loraplus_lr_ratio"] = lora_plus_ratio
    notes = {
        "ss_network_module": "networks.lora" if kind == "LoRA" else "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
    }
    return notes | ({"ss_network_args": json.dumps({k: str(v) for k, v in args.items()})} if args else {})


def _by_layer(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        stem, _, leaf = key.partition(".")
        layers.setdefault(stem, {})[leaf] = value
    return list(layers.values())


def metadata(
    *, name: str, base: str, trigger: str, network: dict[str, str], lr: float, steps: int, batch_size: int, seed: int,
    resolution: int, captions: list[str], loss: Loss, dataset_hash: str, base_hash: str,
) -> dict[str, str]:  # fmt: skip
    """What other programs show of the file; every value is a string, as safetensors asks. `loss` is settled, and
    `network` is what network_notes says of the adapter.

    `ss_*` are kohya's keys: Forge lists a file for SDXL only if ss_base_model_version starts with "sdxl_", and offers
    the words of ss_tag_frequency. `modelspec.*` is Stability's specification 1.0.0."""
    from lora_lab import __version__

    masked = "" if loss.masks == "none" else f", masks: {loss.masks}"
    huber = loss.type in ("huber", "smooth_l1")
    words: dict[str, int] = {}
    for caption in captions:
        for phrase in filter(None, (p.strip() for p in caption.split(","))):
            words[phrase] = words.get(phrase, 0) + 1
    return {
        "ss_output_name": name,
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": base,
        "ss_sd_model_hash": base_hash,
        **network,
        "ss_learning_rate": str(lr),
        "ss_steps": str(steps),
        "ss_max_train_steps": str(steps),
        "ss_batch_size_per_device": str(batch_size),
        "ss_seed": str(seed),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_num_train_images": str(len(captions)),
        "ss_zero_terminal_snr": str(loss.zero_terminal_snr),
        "ss_min_snr_gamma": str(loss.snr_gamma if loss.weighting == "min_snr" else None),
        "ss_debiased_estimation": str(loss.weighting == "debiased"),
        "ss_loss_type": loss.type,
        "ss_huber_schedule": str(loss.huber_schedule if huber else None),
        "ss_huber_c": str(loss.huber_c if huber else None),
        "ss_noise_offset": str(loss.noise_offset or None),
        "ss_multires_noise_iterations": str(loss.pyramid_iterations or None),
        "ss_multires_noise_discount": str(loss.pyramid_discount if loss.pyramid_iterations else None),
        "ss_tag_frequency": json.dumps({trigger: words}, ensure_ascii=False),
        "ss_training_comment": f"lora_lab {__version__}, dataset {dataset_hash}{masked}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": "v" if loss.prediction == "v_prediction" else "epsilon",
        "modelspec.timestep_range": f"{loss.min_timestep},{loss.max_timestep}",
    }


def save_lora(path: Path, state: dict[str, Tensor], dtype: torch.dtype, notes: dict[str, str]) -> Path:
    """Write `state` in `dtype` (alphas stay float32: they are exact numbers) with `notes` as metadata, atomically."""
    cast = {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in state.items()}
    return write_atomically(path, lambda file: save_file(cast, str(file), metadata=notes))


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files hold the same LoRA. Their bytes may differ: safetensors writes metadata in no fixed order."""
    try:
        mine, theirs = load_file(str(one)), load_file(str(other))
    except SafetensorError:
        return False
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def keep_older(path: Path) -> Path | None:
    """Give what stands at `path` a free number (NAME.1.safetensors), so that a new file can take the name."""
    if not path.exists():
        return None
    numbered = re.compile(rf"{re.escape(path.stem)}\.(\d+){path.suffix}")
    numbers = [int(found[1]) for file in path.parent.iterdir() if (found := numbered.fullmatch(file.name))]
    older = path.with_name(f"{path.stem}.{max(numbers, default=0) + 1}{path.suffix}")
    path.rename(older)
    return older
