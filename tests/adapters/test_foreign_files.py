"""LoRA files of strangers: each fault is one sentence that names the file, and nothing of it runs or is printed raw."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_lab.adapters.files import CHARACTERS, COUNT, TRIGGER, resolve_lora
from lora_lab.base.load import layer_shapes
from lora_lab.base.locate import PICKLES, locate_model
from lora_lab.errors import InputError
from lora_lab.launch.config import compose

LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
UNKNOWN = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"  # in the names of another program
BOMB = "[" * 1_000_000


def layer(name=LAYER, rank=2, inputs=96, outputs=96, value=1.0, alpha=2.0):
    return {
        f"{name}.lora_down.weight": torch.full((rank, inputs), value),
        f"{name}.lora_up.weight": torch.ones(outputs, rank),
        f"{name}.alpha": torch.tensor(alpha),
    }


def written(tensors, **metadata):
    return lambda file: save_file(tensors, file, metadata=metadata)


def raw(header, data=b"", claimed=None):
    """A file with this header, as text or as what becomes JSON, and these bytes behind it."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return lambda file: file.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)


def one(dtype="F32", shape=(2, 2), offsets=(0, 16), name=f"{LAYER}.lora_down.weight"):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def truncated(file):
    save_file(layer(), file)
    file.write_bytes(file.read_bytes()[:-40])


FAULTS = {
    "no bytes": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no tensors at all" * 9),
    "cut": truncated,
    "a header of 2 GB": raw("{}", claimed=2**31),
    "a header of 2^63": raw("{}", claimed=2**63),
    "a header that is a list": raw([1, 2]),
    "a header of brackets": raw(BOMB),
    "metadata that is no text": raw({"__metadata__": {"ss_steps": 5}} | one(), b"\0" * 16),
    "metadata that is nested": raw({"__metadata__": {"a": {"b": "c"}}} | one(), b"\0" * 16),
    "a type that there is not": raw(one(dtype="F1024"), b"\0" * 16),
    "a negative shape": raw(one(shape=(-2, -2)), b"\0" * 16),
    "a shape beyond the file": raw(one(shape=(2**40, 2**20)), b"\0" * 16),
    "a shape that overflows": raw(one(shape=(2**63, 4)), b"\0" * 16),
    "tensors on each other": raw(one() | one(name=f"{LAYER}.lora_up.weight"), b"\0" * 16),
    "no numbers": written(layer(rank=0)),
    "huge and empty": raw(one(shape=(2**50, 0), offsets=(0, 0))),
    "one matrix": written({f"{LAYER}.lora_up.weight": torch.ones(96, 2)}),
    "two ranks": written(layer() | {f"{LAYER}.lora_up.weight": torch.ones(96, 3)}),
    "a matrix that is a vector": written(layer() | {f"{LAYER}.lora_up.weight": torch.ones(2)}),
    "many alphas": written(layer() | {f"{LAYER}.alpha": torch.ones(3)}),
    "whole numbers": written({key: value.long() for key, value in layer().items()}),
    "nan": written(layer(value=float("nan"))),
    "inf": written(layer(name=UNKNOWN, value=float("-inf"))),
    "alpha nan": written(layer(alpha=float("nan"))),
    "no adapter": written({"model.weight": torch.ones(2, 2)}),
    "no tensor": written({}),
    "embeddings": written({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 32)}),
    "a key that a terminal obeys": written({"\x1b]0;owned\x07\x1b[2J": torch.ones(2, 2)}),
    "a long key": written({"k" * 100_000: torch.ones(2, 2)}),
    "other shapes": written(layer(inputs=640, outputs=640)),
    "another kind of base": written(layer(LAYER.replace("down_blocks_1", "down_blocks_9"))),
    "arguments of brackets": written(layer(), ss_network_args=BOMB),
    "arguments that are a list": written(layer(), ss_network_args="[1]"),
    "a factor that is no number": written(layer(), ss_network_args='{"factor": "many"}'),
    "diffusers' metadata of brackets": written(layer(), lora_adapter_metadata=BOMB),
    "another trigger": written(layer(), **{TRIGGER: "\x1b[31mMINT\n" * 50_000}),
    "other characters": written(
        layer(), **{CHARACTERS: json.dumps({str(i): f"\x1b[31m{i}" * 900 for i in range(900)})}
    ),
    "tokens that are missing": written(layer(), **{TRIGGER: "HANA_TOFU", COUNT: "9" * 100_000}),
}


@pytest.fixture(scope="module")
def layers():
    shapes = layer_shapes(compose().model)
    assert shapes[LAYER] == (96, 96) and len(shapes) > 100
    return shapes


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("key", ["lora", "stage.start_from"])
def test_a_fault_is_one_printable_sentence_that_names_the_file(tmp_path, layers, fault, key):
    file = tmp_path / "stranger.safetensors"
    FAULTS[fault](file)
    with pytest.raises(InputError) as caught:
        resolve_lora(str(file), ["HANA_TOFU"], layers, key)
    sentence = str(caught.value)
    assert "stranger" in sentence and sentence.isprintable() and len(sentence) < 600, sentence[:1000]


FORMS = {
    "ours": layer(),
    "half": {key: value.half() for key, value in layer().items()},
    "another program's names": layer(UNKNOWN, 2, 640, 640),
    "peft's names": {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value
        for key, value in layer("unet.mid_block.attentions.0.proj_in").items()
    },
    "convolutions for linear layers": {
        key: value.reshape(*value.shape, 1, 1) if value.ndim else value for key, value in layer().items()
    },
}


@pytest.mark.parametrize("tensors", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("metadata", [{}, {"ss_network_args": "{}", "note": "x" * 10_000_000}])
def test_what_is_not_known_of_a_file_is_no_fault(tmp_path, layers, tensors, metadata):
    save_file(tensors, tmp_path / "stranger.safetensors", metadata=metadata)
    assert resolve_lora(str(tmp_path / "stranger.safetensors"), ["HANA_TOFU"], layers).is_file()


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("suffix", [*PICKLES, ".CKPT", ".Pt", ".safetensors", "", ".zip"])
@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_a_pickle_is_refused_and_never_run(tmp_path, suffix, protocol):
    marker, file = tmp_path / "ran", tmp_path / f"stranger{suffix}"
    if protocol == "pickle":
        file.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save({"state_dict": Payload(marker)}, file)
    for key in ("lora", "stage.start_from"):
        with pytest.raises(InputError, match="stranger"):
            resolve_lora(str(file), [], {}, key)
    if suffix.lower() in PICKLES:
        for key in ("model.base", "model.vae", "captioner.base", "model.judge"):
            with pytest.raises(InputError, match=rf"{key}=.*stranger.* can hold code"):
                locate_model(key, str(file))
    assert not marker.exists()


@pytest.mark.parametrize("content", ["[]", "{", '"text"', '{"lora": 3}', '{"lora": [1]}', BOMB, b"\xff\xfe\x00"])
def test_a_run_folder_with_a_damaged_result_is_named(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"lora={tmp_path}: its result.json is damaged"):
        resolve_lora(str(tmp_path), [])


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "", " "])
def test_a_name_that_can_be_no_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^lora="):
        resolve_lora(name, [])


def test_a_long_path_is_named_with_its_end():
    with pytest.raises(InputError, match=r"^lora=/data/a+/hana_tofu\.safetensors: no such file"):
        resolve_lora(f"/data/{'a' * 90}/hana_tofu.safetensors", [])
