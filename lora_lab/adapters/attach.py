"""Put a LoRA file on the base for a while: validation, img2img and everything else that draws goes through here."""

import difflib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_lab.adapters.files import PREFIX, adapter_kind, config_from_state, peft_state
from lora_lab.adapters.tokens import is_embeddings_file, read_tokens, tokens_disabled, tokens_installed
from lora_lab.base.load import DTYPES
from lora_lab.errors import InputError

MODELS = Path("models") / "lora"  # beside where the user works


def find_lora(value: str, key: str = "lora") -> Path:
    """The file that `key`=`value` means: a file, a name in models/lora, or a run folder. Raises InputError."""
    path = Path(value)
    if path.is_file():
        return path
    if path.is_dir():
        result = path / "result.json"
        lora = json.loads(result.read_text(encoding="utf-8")).get("lora") if result.is_file() else None
        inside = [Path(lora)] if lora else []
        # By name backwards stands the finished NAME.safetensors, then the newest of the NAME-000100.safetensors.
        snapshots = sorted(_loras(path / "lora"), reverse=True)
        inside += [path / "lora" / Path(lora).name] if lora else snapshots
        for file in inside:
            if file.is_file():
                return file
        raise InputError(
            f"{key}={value}: this folder has no finished LoRA (neither result.json nor lora/*.safetensors)"
        )
    named = MODELS / f"{value}.safetensors"
    if named.is_file():
        return named
    names = sorted(f.stem for f in _loras(MODELS))
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"{MODELS} has {', '.join(names) or 'none yet: train one'}"
    raise InputError(f"{key}={value}: no such file, run folder or name; {hint}")


def _loras(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*.safetensors") if not is_embeddings_file(file)]


@contextmanager
def lora_attached(
    pipe: StableDiffusionXLPipeline, lora: Path | None, weight: float = 1.0, fuse: bool = False
) -> Iterator[None]:
    """Within the context `pipe` draws with the file's LoRA at `weight`, and reads its trigger as the file's new tokens
    if it has any; what is in training is set aside.

    The file itself is loaded, also in the middle of training: a validation picture is what inference will give.
    With `fuse` what the file adds is summed into the UNet's weights: see _fused.
    Raises InputError if the file is not a LoRA for this base."""
    parts = [getattr(pipe, part) for part in PREFIX]
    training = [p for part in parts for p in part.parameters() if p.requires_grad]
    adapted = [getattr(pipe, part) for part in pipe.get_list_adapters()] if training else []
    active = [part.active_adapters() for part in adapted]
    for part in adapted:
        part.disable_adapters()
    try:
        with tokens_disabled(pipe), ExitStack() as stack:
            if lora is not None and weight:
                _load_lora(pipe, lora, weight)
                if tokens := read_tokens(lora):
                    stack.enter_context(tokens_installed(pipe, *tokens))
            if fuse:
                stack.enter_context(_merged(pipe.unet))
            yield
    finally:
        if training:
            pipe.delete_adapters("attached")
            for part, names in zip(adapted, active, strict=True):
                part.enable_adapters()
                part.set_adapter(names)  # asks for gradients of all of these
            for part in parts:
                part.requires_grad_(False)
            for parameter in training:
                parameter.requires_grad_(True)
        elif lora is not None and weight:
            pipe.unload_lora_weights()  # leaves no wrapped layers behind


@contextmanager
def adapters_disabled(*networks: nn.Module) -> Iterator[None]:
    """Within the context `networks` compute what the base's alone would, in the middle of a training step.

    peft's and diffusers' own switches also set what asks for gradients: they would freeze what learns, and let learn
    what PiSSA keeps."""
    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _load_lora(pipe: StableDiffusionXLPipeline, lora: Path, weight: float) -> None:
    try:
        with safe_open(str(lora), "pt") as file:
            kind, notes = adapter_kind(file.keys()), file.metadata() or {}
        if kind == "LoRA":
            # Without use_safetensors a damaged file would be tried as a pickle.
            pipe.load_lora_weights(
                str(lora.parent), weight_name=lora.name, adapter_name="attached", use_safetensors=True
            )
        else:  # diffusers refuses LoHa and LoKr, and reads DoRA without its magnitudes
            _load_into_unet(pipe, load_file(str(lora)), notes)
        pipe.set_adapters(["attached"], [weight])
    except Exception as error:  # a file that does not fit makes diffusers and peft raise nearly anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{lora}: does not fit this base as a LoRA ({' '.join(lines[:2])[:200]})") from error
    for part, adapters in pipe.get_list_adapters().items():
        if "attached" in adapters:  # a file need not be about all parts
            getattr(pipe, part).enable_adapters()


def _load_into_unet(pipe: StableDiffusionXLPipeline, state: dict[str, Tensor], notes: dict[str, str]) -> None:
    factor = int(json.loads(notes.get("ss_network_args", "{}")).get("factor", -1))
    pipe.unet.add_adapter(config_from_state(pipe.unet, state, factor), "attached")
    pipe.unet.requires_grad_(False)
    set_peft_model_state_dict(pipe.unet, peft_state(pipe.unet, state, "attached"), "attached")


@contextmanager
def _merged(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within the context layers that wear a file compute W x with W = W0 + what it adds, instead of two more products.

    W is a tensor of its own, rounded to the base's precision; W0 stays where it is, untouched, and comes back. That is
    the price: these weights twice, for SDXL's attention 1.9 GB in bfloat16. What is no plain layer keeps its products:
    a quantised one has no weights that could be added to."""
    before: list[tuple[BaseTunerLayer, list[tuple[nn.Parameter, Tensor]]]] = []
    try:
        with torch.no_grad():
            for layer in unet.modules():
                if not isinstance(layer, BaseTunerLayer) or "attached" not in layer.scaling:
                    continue
                base = layer.get_base_layer()
                if type(base) in (nn.Linear, nn.Conv2d) and base.weight.dtype in DTYPES.values():
                    before.append((layer, [(parameter, parameter.data) for parameter in base.parameters()]))
                    for parameter in base.parameters():
                        parameter.data = parameter.data.clone()
                    layer.merge(adapter_names=["attached"])
        yield
    finally:
        for layer, whole in before:
            layer.merged_adapters.clear()  # not unmerged: W - (W - W0) is not W0
            for parameter, data in whole:
                parameter.data = data
