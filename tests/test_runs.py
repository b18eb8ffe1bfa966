"""A signal ends a run, whatever the library that it interrupts makes of it."""

import ast
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from package_source import read_package
from safetensors import SafetensorError
from safetensors.torch import save_file

from lora_lab.adapters.files import read_metadata, same_tensors
from lora_lab.base.controlnet import load_controlnet
from lora_lab.base.encode import Cache
from lora_lab.base.load import layer_shapes, load_base, token_counter
from lora_lab.captions.blip import load_blip
from lora_lab.demo import BASE, CAPTIONER
from lora_lab.images.detect import people
from lora_lab.launch.config import compose
from lora_lab.runs import signals_deferred, stop_on_signal

CPU = torch.device("cpu")
READING = {"base", "adapters", "captions", "evaluation", "images", "sampling", "stages", "training"}
BROAD = {"Exception", "BaseException", "SafetensorError"}  # among what a library may make of a KeyboardInterrupt


@contextmanager
def stopping_signal():
    """SIGTERM raises KeyboardInterrupt, as in the program."""

    def stop(number, frame):
        raise KeyboardInterrupt(f"signal {number}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


def compiled_code(*_, error=SafetensorError, **__):
    """A library that two signals interrupt, and that raises `error` instead."""
    signal.raise_signal(signal.SIGTERM)
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        if error:
            raise error("'NoneType' object is not callable") from None


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, SystemError, GeneratorExit, None])
def test_a_deferred_signal_arrives_at_the_end_whatever_a_library_made_of_the_next_one(error):
    with stopping_signal():
        with pytest.raises(KeyboardInterrupt, match=f"signal {int(signal.SIGTERM)}"), signals_deferred():
            compiled_code(error=error)
        done = []
        with pytest.raises(KeyboardInterrupt), signals_deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("went on")
        assert done
        with pytest.raises(TypeError), signals_deferred():
            raise TypeError


def test_a_signal_that_only_sets_a_flag_stays_one(tmp_path, capsys):
    with stop_on_signal(tmp_path) as stopped:
        with signals_deferred("the model is loaded first"):
            signal.raise_signal(signal.SIGTERM)
            assert not stopped() and "the model is loaded first" in capsys.readouterr().out
        assert stopped()


CACHED = {"latents": ((1,), torch.float32)}
LOADERS = {  # what reads a file -> what it calls for that, and a call
    "base": ("lora_lab.base.sdxl._load_pipeline", lambda _: load_base(compose().model, CPU)),
    "vae": ("lora_lab.base.sdxl.AutoencoderKL.from_pretrained",
            lambda _: load_base(compose(f"model.vae={BASE / 'vae'}").model, CPU)),
    "controlnet": ("lora_lab.base.controlnet.ControlNetModel.load_config",
                   lambda _: load_controlnet(compose("structure=canny").structure, None, 8, torch.float32)),
    "captioner": ("transformers.AutoConfig.from_pretrained", lambda _: load_blip(str(CAPTIONER), CPU)),
    "segmentation": ("lora_lab.images.detect.AutoConfig.from_pretrained", lambda _: people("key", str(BASE), [], CPU)),
    "tokenizer": ("lora_lab.base.load.CLIPTokenizer.from_pretrained", lambda _: token_counter(str(BASE))),
    "shapes": ("lora_lab.base.load.safe_open", lambda _: layer_shapes(compose().model)),
    "metadata": ("lora_lab.adapters.files.safe_open", read_metadata),
    "two LoRAs": ("lora_lab.adapters.files.load_file", lambda file: same_tensors(file, file)),
    "cache": ("lora_lab.base.encode.safe_open", lambda file: Cache(file.parents[1]).get("latents", file.stem, CACHED)),
}  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
def test_a_signal_while_a_file_is_read_is_no_fault_of_the_file(loader, tmp_path, monkeypatch):
    name, load = LOADERS[loader]
    (tmp_path / "latents").mkdir()
    save_file({"latents": torch.zeros(1)}, tmp_path / "latents" / "x.safetensors")
    monkeypatch.setattr(name, compiled_code)
    with stopping_signal(), pytest.raises(KeyboardInterrupt):
        load(tmp_path / "latents" / "x.safetensors")


def test_every_broad_handler_around_a_library_defers_signals():
    deferred = {}
    for module in read_package(Path(__file__).parents[1]):
        for node in ast.walk(module.tree) if module.path.split("/")[0] in READING else ():
            if isinstance(node, ast.Try) and any(map(translates, node.handlers)):
                deferred[f"{module.path}:{node.lineno}"] = "signals_deferred(" in "".join(map(ast.unparse, node.body))
    assert len(deferred) >= 9 and [place for place, defers in deferred.items() if not defers] == []


def translates(handler: ast.ExceptHandler) -> bool:
    """Whether it catches what a library may make of a KeyboardInterrupt, and does not raise that again."""
    caught = {name.id for name in ast.walk(handler.type) if isinstance(name, ast.Name)} if handler.type else BROAD
    raises = isinstance(last := handler.body[-1], ast.Raise) and last.exc is None
    return bool(caught & BROAD) and not raises
