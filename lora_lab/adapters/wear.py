"""Put a LoRA file on the base for a while: validation, img2img and everything else that draws goes through here."""

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import StableDiffusionXLPipeline

from lora_lab.errors import InputError

MODELS = Path("models") / "lora"  # beside where the user works


def find_lora(value: str) -> Path:
    """The file that `lora=` means: a file, a name in models/lora, or a run folder. Raises InputError."""
    path = Path(value)
    if path.is_file():
        return path
    if path.is_dir():
        result = path / "result.json"
        lora = json.loads(result.read_text(encoding="utf-8")).get("lora") if result.is_file() else None
        inside = [Path(lora)] if lora else []
        inside += [path / "lora" / Path(lora).name] if lora else sorted((path / "lora").glob("*.safetensors"))
        for file in inside:
            if file.is_file():
                return file
        raise InputError(f"lora={value}: this folder has no finished LoRA (neither result.json nor lora/*.safetensors)")
    named = MODELS / f"{value}.safetensors"
    if named.is_file():
        return named
    names = sorted(f.stem for f in MODELS.glob("*.safetensors"))
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"{MODELS} has {', '.join(names) or 'none yet: train one'}"
    raise InputError(f"lora={value}: no such file, run folder or name; {hint}")


@contextmanager
def worn(pipe: StableDiffusionXLPipeline, lora: Path | None, weight: float = 1.0) -> Iterator[None]:
    """Within the context `pipe` draws with the file's LoRA at `weight`; an adapter in training is set aside.

    The file itself is loaded, also in the middle of training: a validation picture is what inference will give."""
    training = [p for p in pipe.unet.parameters() if p.requires_grad]
    active = pipe.unet.active_adapters() if training else []
    if training:
        pipe.unet.disable_adapters()
    try:
        if lora is not None and weight:
            try:
                pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="worn")
            except (ValueError, RuntimeError, KeyError, OSError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise InputError(f"{lora}: does not fit this base as a LoRA ({first})") from error
            if training:
                pipe.unet.enable_adapters()
            pipe.set_adapters(["worn"], [weight])
        yield
    finally:
        if "worn" in pipe.get_list_adapters().get("unet", []) or _has_worn(pipe):
            pipe.delete_adapters("worn")
        if training:
            pipe.unet.enable_adapters()
            pipe.unet.set_adapter(active)
            for parameter in training:
                parameter.requires_grad_(True)


def _has_worn(pipe: StableDiffusionXLPipeline) -> bool:
    return any("worn" in names for names in pipe.get_list_adapters().values())
