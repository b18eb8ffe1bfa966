"""LoRA files: their tensors and metadata, and how they are found, saved, compared and numbered.

Tensors have kohya's keys, which diffusers, ComfyUI, AUTOMATIC1111, Forge and kohya's tools load. LoHa and LoKr have
LyCORIS's keys, and DoRA its magnitudes: docs/lora-file.md says which programs read those. A file's key is
`base.lora_key(component, module)`, a dot, and the name of a tensor (a leaf)."""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lab import __version__
from lora_lab.base.locate import refuse_pickle
from lora_lab.console import cut, printable, say
from lora_lab.errors import InputError
from lora_lab.runs import read_result, signals_deferred, write_atomically
from lora_lab.settings.schema import Loss, Text, Triggers
from lora_lab.settings.sections import WINDOWS

MODELS = Path("models") / "lora"  # in the user's working folder
COUNT = "lora_lab_tokens"  # metadata of a LoRA file: how many tokens stand for its trigger
TRIGGER = "modelspec.trigger_phrase"
MOST_NAMED = 4  # triggers of a file
CHARACTERS = "lora_lab_characters"  # JSON, folder -> trigger, of a file with several characters
TOKEN_LIMIT = "ss_max_token_length"  # kohya's name of text.max_tokens
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

    `values` has the parameters by component.name, of the same shapes, in full precision, if those in the modules are
    rounded.

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
    """The inverse of kohya_state: a file's tensors, of the same shapes, by the names that set_peft_model_state_dict
    expects for `adapter` of `model`. `key_of` gives a module's name in the file.

    If the adapter has another alpha than the file, the tensors are scaled, so that the adapter adds to the weights what
    the file says. Raises ValueError for a key that `model` has no module for."""
    peft_leaves = {leaf: peft_leaf for peft_leaf, leaf in LEAVES.items()}
    tensors = {}
    for module, leaves in layers_of(model, state, key_of).items():
        layer, alpha = model.get_submodule(module), leaves.pop("alpha")
        rank = rank_of(leaves)
        factor = (alpha.item() / rank if rank else 1.0) / layer.scaling[adapter]
        for leaf, value in leaves.items():
            value = value.float() * factor if leaf in SCALED and factor != 1 else value  # fp8 has no products
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


def network_metadata(config: PeftConfig, state: dict[str, Tensor], lora_plus_ratio: float) -> dict[str, str]:
    """What kind of adapter `state` (of kohya_state) is, by its keys and shapes, in the words of kohya's scripts and of
    LyCORIS."""
    kind, layers = adapter_kind(state), by_layer(state)
    ranked = [leaves for leaves in layers if rank_of(leaves)]
    ranks = {rank_of(leaves) for leaves in ranked} or {config.r}
    alphas = {leaves["alpha"].item() for leaves in ranked} or {float(config.r)}
    dim, alpha = (str(values.pop()) if len(values) == 1 else "Dynamic" for values in (ranks, alphas))
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
    network = {
        "ss_network_module": "networks.lora" if kind == "LoRA" else "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
    }
    return network | ({"ss_network_args": json.dumps({k: str(v) for k, v in args.items()})} if args else {})


def metadata(
    *, name: str, base: str, kind_of_base: Mapping[str, str], triggers: Triggers, network: dict[str, str], lr: float,
    steps: int, batch_size: int, seed: int, resolution: int, captions: Mapping[str, str], text: Text, loss: Loss,
    prediction: str, dataset_hash: str, base_hash: str,
) -> dict[str, str]:  # fmt: skip
    """What other programs show of the file; every value is a string, as safetensors requires.

    `captions` are by the image's name, `kind_of_base` is BaseModel.lora_metadata, `network` what network_metadata
    gives, `loss` is resolved, `prediction` is NoiseSchedule.prediction. `ss_*` are kohya's keys: Forge offers the words
    of ss_tag_frequency. `modelspec.*` is Stability's specification 1.0.0."""
    masked = "" if loss.masks == "none" else f", masks: {loss.masks}"
    huber = loss.type in ("huber", "smooth_l1")
    counts: dict[str, dict[str, int]] = {trigger: {} for trigger in triggers.all}
    for image, caption in captions.items():
        own = counts[triggers.of(image)]
        for phrase in filter(None, (p.strip() for p in caption.split(","))):
            own[phrase] = own.get(phrase, 0) + 1
    long = {TOKEN_LIMIT: str(text.max_tokens)} if text.window > WINDOWS[77] else {}
    several = {CHARACTERS: json.dumps(triggers.by_folder, ensure_ascii=False)} if triggers.all[1:] else {}
    return {
        "ss_output_name": name,
        "ss_sd_model_name": base,
        "ss_sd_model_hash": base_hash,
        **kind_of_base,
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
        "ss_tag_frequency": json.dumps(counts, ensure_ascii=False),
        "ss_training_comment": f"lora_lab {__version__}, dataset {dataset_hash}{masked}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": name,
        "modelspec.resolution": f"{resolution}x{resolution}",
        TRIGGER: triggers.phrase,
        **several,
        **long,
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        "modelspec.timestep_range": f"{loss.min_timestep},{loss.max_timestep}",
    }


PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}  # modelspec.prediction_type -> loss.prediction
ZERO_SNR = {"True": True, "False": False}  # ss_zero_terminal_snr -> loss.zero_terminal_snr


def prediction_from_metadata(loss: Loss, base: str, lora: Path | None) -> Loss:
    """`loss` with the prediction that the file's metadata states, where `loss` leaves it open and the file was trained
    on the same `base` (model.base). What the file does not state stays open. Raises InputError for an unreadable file.
    """
    stated = read_metadata(lora) if lora else {}
    if stated.get("ss_sd_model_name") != base:
        return loss
    if loss.prediction == "auto":
        loss = replace(loss, prediction=PREDICTIONS.get(stated.get("modelspec.prediction_type"), "auto"))
    if loss.zero_terminal_snr is None:
        loss = replace(loss, zero_terminal_snr=ZERO_SNR.get(stated.get("ss_zero_terminal_snr")))
    return loss


def text_from_metadata(text: Text, lora: Path | None) -> Text:
    """`text` with the limit of tokens that the file was trained with, where `text` leaves it open; said if it is not
    the usual one. Raises InputError for an unreadable file."""
    stated = read_metadata(lora).get(TOKEN_LIMIT, "") if lora and text.max_tokens is None else ""
    if stated not in map(str, WINDOWS) or stated == "77":
        return text
    say(f"{lora.name} was trained with text.max_tokens={stated}, so prompts are read up to there too")
    return replace(text, max_tokens=int(stated))


def read_metadata(lora: Path) -> dict[str, str]:
    """The file's metadata. Raises InputError for an unreadable file."""
    with _opened(lora) as file:
        return file.metadata() or {}


def hash_of_dataset(lora: Path) -> str | None:
    """runs.hash_files of the images that the file was trained on; None where it does not say. Raises InputError for an
    unreadable file."""
    found = re.match(r"lora_lab \S+, dataset (\w+)", read_metadata(lora).get("ss_training_comment", ""))
    return found and found[1]


@contextmanager
def _opened(lora: Path) -> Iterator[safe_open]:
    """A safetensors file, whose header has been checked. Raises InputError, also for what goes wrong within."""
    if lora.suffix != ".safetensors":
        raise InputError(f"{lora}: is not a .safetensors file by its name, and no other kind is read")
    try:
        with signals_deferred(), safe_open(str(lora), "pt") as file:
            yield file
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = printable(" ".join(str(error).split()), 200)
        raise InputError(f"{lora}: is not a readable .safetensors file ({reason})") from error


PAIRS = (  # (down, up): the ends of the names of a LoRA's matrices, by kohya's scripts, peft and older diffusers
    (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"), ("_lora.down.weight", "_lora.up.weight"),
)  # fmt: skip
MATRICES = re.compile(r"lora[_.]|hada_w|lokr_w")  # in the names of the tensors of every adapter that bases can load
NESTED = ("ss_network_args", "lora_adapter_metadata")  # metadata whose JSON is read, here or by diffusers


def validate_lora(lora: Path, layers: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError for a file that cannot be read, holds no adapter, or numbers that are not finite, and for one
    whose matrices have not the shapes of `layers`, by their names in a file, as far as these are known.

    Tensors are read one at a time, and nothing but a .safetensors file is opened."""
    with _opened(lora) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        reason = _odd_metadata(file.metadata() or {}) or _odd_shapes(shapes) or _other_base(shapes, layers)
        for key in shapes if not reason else ():
            values = file.get_tensor(key)
            if not (values.is_floating_point() or key.endswith(".alpha")):
                reason = f"{cut(key)} has numbers of the type {values.dtype}, which no LoRA has"
            elif not values.float().isfinite().all():
                reason = f"{cut(key)} has numbers that are not finite, the training that wrote it failed"
            if reason:
                break
    if reason:
        raise InputError(f"{lora}: {reason}")


def _odd_metadata(metadata: Mapping[str, str]) -> str | None:
    for key in NESTED:
        try:
            content = json.loads(metadata.get(key, "{}"))
            if not isinstance(content, dict):
                raise ValueError
            int(content.get("factor", -1))  # of LoKr
        except (ValueError, TypeError, RecursionError):
            return f"its metadata {key} is damaged"
    return None


def _odd_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    if not any(MATRICES.search(key) for key in shapes):
        return f"holds no LoRA, LoHa or LoKr: its {len(shapes)} tensors begin with {cut(next(iter(shapes), '-'))}"
    for key, shape in shapes.items():
        if 0 in shape or (key.endswith(".alpha") and math.prod(shape) != 1):
            return f"{cut(key)} has the shape {shape}, which no LoRA has"
        for down, up in PAIRS:
            if not key.endswith((down, up)):
                continue
            stem = key.removesuffix(down).removesuffix(up)
            first, second = shapes.get(f"{stem}{down}"), shapes.get(f"{stem}{up}")
            if first is None or second is None:
                return f"of the two matrices of {cut(stem)} one is missing"
            if min(len(first), len(second)) < 2 or first[0] != second[1]:
                return f"the matrices of {cut(stem)} have the shapes {first} and {second}, which do not fit"
    return None


def _other_base(shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why matrices of `shapes` are not for a base with `layers`; None where the names of either are not known."""
    stems = dict.fromkeys(key.partition(".")[0] for key in shapes)
    kinds = {_beginning(name) for name in layers}
    if not layers.keys() & stems.keys() and any(_beginning(stem) in kinds for stem in stems):
        return f"was trained on another kind of base model: this one has no layer {cut(next(iter(stems)))}"
    for stem in layers.keys() & stems.keys():
        expected, (down, up) = layers[stem], (shapes.get(stem + end) for end in PAIRS[0])
        if down and up and len(expected) > 1 and (up[0], down[1]) != expected[:2]:
            return (
                f"does not fit this base as a LoRA: {cut(stem)} is from {down[1]} to {up[0]} numbers, the base's "
                f"layer from {expected[1]} to {expected[0]}"
            )
    return None


def _beginning(name: str) -> str:
    """`lora_unet_down_blocks` of a layer's name: what bases of the same library have in common."""
    return "_".join(name.split("_")[:4])


def resolve_lora(
    value: str, triggers: Sequence[str], layers: Mapping[str, tuple[int, ...]] = MappingProxyType({}), key: str = "lora"
) -> Path:
    """The file that `key`=`value` names. Raises InputError for a missing file, for one that `validate_lora` refuses or
    that lacks the embeddings that it needs, and for one that was not trained on one of `triggers`, which would not
    render the character."""
    refuse_pickle(key, value)
    lora = find_lora(value, key)
    validate_lora(lora, layers)
    read_tokens(lora)
    trained = triggers_of(lora)
    for trigger in triggers if trained else ():
        if trigger not in trained.all:
            names = [printable(name, 40) for name in trained.all[:MOST_NAMED]]
            words = f"{len(trained.all)} triggers" if names[1:] else f"the trigger {names[0]}"
            which = " or ".join(f"trigger={name}" for name in names)
            raise InputError(f"{lora.name} was trained on {words}, not {trigger}: set {which}")
    return lora


def triggers_of(lora: Path) -> Triggers | None:
    """The triggers of the file's characters; None where it does not say. Raises InputError for an unreadable file."""
    stated = read_metadata(lora)
    with suppress(ValueError, RecursionError):
        by_folder = json.loads(stated.get(CHARACTERS, "null"))
        if isinstance(by_folder, dict) and by_folder:
            return Triggers({str(folder): str(trigger) for folder, trigger in by_folder.items()})
    return Triggers({"": stated[TRIGGER]}) if stated.get(TRIGGER) else None


def find_lora(value: str, key: str = "lora") -> Path:
    """The file that `key`=`value` names: a file, a name in models/lora, or a run folder. Raises InputError."""
    path = Path(value)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            return _lora_of_run(path, key)
        named = MODELS / f"{value}.safetensors"
        if named.is_file():
            return named
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise InputError(f"{key}={value}: cannot be looked up ({error.strerror})") from error
    names = sorted(file.stem for file in _loras(MODELS))
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"{MODELS} has {', '.join(names) or 'none yet: train one'}"
    raise InputError(f"{key}={value}: no such file, run folder or name; {hint}")


def _lora_of_run(run: Path, key: str) -> Path:
    """The finished LoRA of the run in the folder `run`, else its newest one. Raises InputError."""
    try:
        result = read_result(run)
        lora = None if result is None else result.get("lora")
        # In reverse order of names the finished NAME.safetensors comes first, then the newest NAME-000100.safetensors.
        snapshots = sorted(_loras(run / "lora"), reverse=True)
        candidates = [Path(lora), run / "lora" / Path(lora).name] if lora else snapshots
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{key}={run}: its result.json is damaged, name the LoRA file itself") from error
    for file in candidates:
        if file.is_file():
            return file
    raise InputError(f"{key}={run}: this folder has no finished LoRA (neither result.json nor lora/*.safetensors)")


def _loras(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*.safetensors") if not is_embeddings_file(file)]


def save_lora(path: Path, state: dict[str, Tensor], dtype: torch.dtype, metadata: dict[str, str]) -> Path:
    """Write `state` (of kohya_state, any shapes) in `dtype`, atomically; alphas stay float32: they are exact."""
    cast = {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in state.items()}
    return write_atomically(path, lambda file: save_file(cast, str(file), metadata=metadata))


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two files hold the same LoRA. Their bytes may differ: safetensors writes metadata in no fixed order."""
    try:
        with signals_deferred():
            one, other = load_file(str(first)), load_file(str(second))
    except SafetensorError:
        return False
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def keep_older(path: Path) -> Path | None:
    """Rename an existing file to a free number (NAME.1.safetensors), so that a new one can take its name; returns the
    new path, None if there was no file."""
    if not path.exists():
        return None
    numbered = re.compile(rf"{re.escape(path.stem)}\.(\d+){path.suffix}")
    numbers = [int(match[1]) for file in path.parent.iterdir() if (match := numbered.fullmatch(file.name))]
    older = path.with_name(f"{path.stem}.{max(numbers, default=0) + 1}{path.suffix}")
    path.rename(older)
    return older


def embeddings_path(lora: Path) -> Path:
    """The path of the embeddings of a LoRA file's trigger: NAME_emb.safetensors beside NAME.safetensors."""
    return lora.with_name(f"{lora.stem}_emb.safetensors")


def is_embeddings_file(file: Path) -> bool:
    """Whether a file holds the embeddings of a LoRA file beside it, and is no LoRA itself."""
    return file.stem.endswith("_emb") and file.with_name(f"{file.stem.removesuffix('_emb')}.safetensors").is_file()


def save_tokens(file: Path, vectors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write the embeddings (count, width) by their keys, in float32: they are few numbers."""
    state = {key: value.detach().float().cpu().contiguous() for key, value in vectors.items()}
    return write_atomically(file, lambda path: save_file(state, str(path), metadata=metadata))


def read_tokens(lora: Path) -> tuple[str, dict[str, Tensor]] | None:
    """The trigger of a LoRA file and the embeddings (count, width) of the tokens that stand for it, by their keys; None
    if the trigger is plain words.

    Raises InputError for an unreadable file, and where the embeddings that it needs are missing, are not as many as it
    says, or not finite."""
    metadata = read_metadata(lora)
    if COUNT not in metadata or TRIGGER not in metadata:
        return None
    file, trigger, count = embeddings_path(lora), metadata[TRIGGER], metadata[COUNT]
    try:
        with signals_deferred():
            vectors = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{lora}: its trigger {printable(trigger, 80)} is {printable(count, 20)} new tokens, whose embeddings "
            f"should be in {file}: put that file there ({printable(str(error).splitlines()[0], 100)})"
        ) from error
    if not vectors or any(value.ndim != 2 or str(len(value)) != count for value in vectors.values()):
        raise InputError(f"{file}: does not hold the embeddings of {printable(count, 20)} new tokens of {lora.name}")
    if not all(value.float().isfinite().all() for value in vectors.values()):
        raise InputError(f"{file}: has numbers that are not finite, the training that wrote it failed")
    return trigger, vectors
