"""Cached values are bit-identical, and a damaged file or one of other weights is not used."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sdxl_structure import NARROW, pipeline

from lora_lab.base.encode import Cache, Encoder, identity_of
from lora_lab.base.sdxl import SDXL
from lora_lab.errors import RunError

CPU = torch.device("cpu")
CAPTIONS = ["A HANA_TOFU", "A HANA_TOFU, smiling", ""]
FORMS = {"latents": ((4, 8, 8), torch.float32)}
KEY = "0" * 64


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


PICTURES = [("a.png", picture(0)), ("b.png", picture(1))]


@pytest.fixture(scope="module")
def pipe():
    return pipeline(NARROW)


@pytest.fixture
def encoder(pipe, tmp_path):
    return Encoder(SDXL(pipe), CPU, Cache(tmp_path / "cache"), offload=False)


def other_weights(pipe, part):
    other = copy.copy(pipe)
    setattr(other, part, copy.deepcopy(getattr(pipe, part)))
    with torch.no_grad():
        next(getattr(other, part).parameters()).flatten()[0] += 0.5
    return other


def files(encoder):
    return sorted(encoder.cache.folder.rglob("*.safetensors"))


def test_cached_values_equal_those_computed_without_a_cache(pipe, encoder):
    fresh = Encoder(SDXL(pipe), CPU, Cache(None), offload=False)
    for attempt, count in ((fresh, 1), (encoder, 1), (encoder, 0)):
        texts, new = attempt.encode_texts(CAPTIONS)
        assert new == count * 3
        expected, _ = fresh.encode_texts(CAPTIONS)
        for caption in CAPTIONS:
            assert torch.equal(texts[caption]["prompt_embeds"], expected[caption]["prompt_embeds"])
            assert torch.equal(texts[caption]["pooled_prompt_embeds"], expected[caption]["pooled_prompt_embeds"])
        latents, new = attempt.encode_images(PICTURES)
        assert new == count * 2
        assert all(torch.equal(a, b) for a, b in zip(latents, fresh.encode_images(PICTURES)[0], strict=True))
    assert len(files(encoder)) == 5


def test_only_new_captions_and_images_are_encoded(encoder):
    encoder.encode_texts(CAPTIONS)
    encoder.encode_images(PICTURES)
    assert encoder.encode_texts([*CAPTIONS[1:], "A HANA_TOFU, winking"])[1] == 1
    assert encoder.encode_images([PICTURES[0], ("b.png", picture(2))])[1] == 1
    assert encoder.encode_images([("renamed.png", PICTURES[1][1])])[1] == 0


def test_values_of_other_weights_or_another_precision_are_not_used(pipe, encoder):
    encoder.encode_texts(CAPTIONS)
    encoder.encode_images(PICTURES)
    for part in ("text_encoder", "text_encoder_2"):
        assert Encoder(SDXL(other_weights(pipe, part)), CPU, encoder.cache, False).encode_texts(CAPTIONS)[1] == 3
    other = Encoder(SDXL(other_weights(pipe, "vae")), CPU, encoder.cache, False)
    assert other.encode_texts(CAPTIONS)[1] == 0 and other.encode_images(PICTURES)[1] == 2
    half = copy.copy(pipe)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        setattr(half, part, copy.deepcopy(getattr(pipe, part)).bfloat16())
    other = Encoder(SDXL(half), CPU, encoder.cache, False)
    assert other.encode_texts(CAPTIONS)[1] == 3 and other.encode_images(PICTURES)[1] == 2
    assert other.encode_texts(CAPTIONS)[0][""]["prompt_embeds"].dtype == torch.bfloat16, (
        "read back in the dtype it was made in"
    )


def test_another_tokenizer_has_other_cache_keys(pipe, encoder):
    encoder.encode_texts(CAPTIONS)
    other = copy.copy(pipe)
    other.tokenizer_2 = copy.deepcopy(pipe.tokenizer_2)
    other.tokenizer_2.pad_token = "!"
    assert Encoder(SDXL(other), CPU, encoder.cache, False).encode_texts(CAPTIONS)[1] == 3


def test_the_scaling_factor_is_part_of_a_network_s_identity(pipe):
    other = copy.deepcopy(pipe.vae)
    assert identity_of(other) == identity_of(pipe.vae)
    other.register_to_config(scaling_factor=1.0)
    assert identity_of(other) != identity_of(pipe.vae)


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


def empty(file):
    file.write_bytes(b"")


def another_shape(file):
    save_file({"latents": torch.zeros(4, 8, 4)}, file)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty, another_shape])
def test_a_damaged_file_is_written_again_and_reported(encoder, damage, capsys):
    (expected, _), _ = encoder.encode_images(PICTURES)
    whole = {file: file.read_bytes() for file in files(encoder)}
    damage(files(encoder)[0])
    (latents, _), new = encoder.encode_images(PICTURES)
    assert new == 1 and torch.equal(latents, expected)
    assert capsys.readouterr().out == f"{files(encoder)[0]} is damaged: it is made again\n"
    assert {file: file.read_bytes() for file in files(encoder)} == whole


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4, 8, 4), torch.zeros(4, 8, 8).half(), torch.full((4, 8, 8), float("nan"))]
)
def test_an_intact_file_of_another_shape_or_dtype_is_refused(tmp_path, tensor, capsys):
    cache = Cache(tmp_path)
    cache.put("latents", KEY, {"latents": tensor})
    assert cache.get("latents", KEY, FORMS) is None and "is damaged" in capsys.readouterr().out


def test_non_finite_values_are_reported_by_name_and_not_cached(pipe, encoder):
    for part, name in (("vae", r"b\.png: the VAE"), ("text_encoder_2", "'A HANA_TOFU': the text encoders")):
        broken = other_weights(pipe, part)
        with torch.no_grad():
            next(getattr(broken, part).parameters()).fill_(float("nan"))
        other = Encoder(SDXL(broken), CPU, encoder.cache, False)
        with pytest.raises(RunError, match=name):
            other.encode_texts(CAPTIONS)
            other.encode_images(PICTURES[1:])
    assert not any(file.parent.name == "latents" for file in files(encoder))


def test_an_unwritable_cache_is_reported_with_the_key_that_turns_it_off(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cache=.*cannot be written.*cache=null"):
        Cache(tmp_path / "file").put("latents", KEY, {"latents": torch.zeros(1)})


@pytest.mark.slow
def test_two_processes_can_write_and_read_one_file_at_once(tmp_path):
    """Each finds nothing or the whole, and says nothing of damage."""
    script = f"""
import torch
from pathlib import Path
from lora_lab.base.encode import Cache
cache, tensor = Cache(Path({str(tmp_path)!r})), torch.arange(2.0**16).reshape(4, 128, 128)
for turn in range(150):
    cache.put("latents", "key", {{"latents": tensor}})
    found = cache.get("latents", "key", {{"latents": ((4, 128, 128), torch.float32)}})
    assert found is not None and torch.equal(found["latents"], tensor)
"""
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert said == ["", ""] and [process.returncode for process in both] == [0, 0]
    assert [file.name for file in Path(tmp_path).rglob("*") if file.is_file()] == ["key.safetensors"]


GPU = torch.device("cpu:0")  # to torch the CPU, but told apart by name


@pytest.fixture
def watched(monkeypatch):
    """A base whose parts tell when they go where: a list of (part, "gpu" or "cpu"), and of what encoded."""
    pipe, moves, here = copy.copy(pipeline(NARROW)), [], set()

    for name in ("vae", "text_encoder", "text_encoder_2", "unet"):
        part = getattr(pipe, name)

        def to(*arguments, name=name, part=part, **settings):
            where = arguments and arguments[0]
            if where in (GPU, "cpu"):
                moves.append((name, "gpu" if where is GPU else "cpu"))
                (here.add if where is GPU else here.discard)(name)
                assert len(here) <= 1 or not pipe.offloading, f"{here} are on the device at once"
            return type(part).to(part, *arguments, **settings)

        monkeypatch.setattr(part, "to", to)
        part.register_forward_pre_hook(lambda *_, name=name: moves.append((name, "runs")))
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda *a: (moves.append(("vae", "runs")), encode(*a))[1])
    pipe.offloading = True
    return pipe, moves


def encode_all(pipe, cache, offload):
    encoder = Encoder(SDXL(pipe), GPU, cache, offload)
    encoder.encode_texts(CAPTIONS[:2])
    encoder.encode_images(PICTURES)


def test_with_offload_one_component_at_a_time_is_on_the_device(watched):
    pipe, moves = watched
    encode_all(pipe, Cache(None), offload=True)
    turns = {part: [(part, "gpu"), (part, "runs"), (part, "runs"), (part, "cpu")] for part, _ in moves}
    assert moves == [*turns["text_encoder"], *turns["text_encoder_2"], *turns["vae"]]


def test_without_offload_components_stay_on_the_device(watched):
    pipe, moves = watched
    pipe.offloading = False
    encode_all(pipe, Cache(None), offload=False)
    assert "cpu" not in {where for _, where in moves}


def test_if_everything_is_cached_no_component_moves_or_runs(watched, tmp_path):
    pipe, moves = watched
    encode_all(pipe, Cache(tmp_path), offload=True)
    moves.clear()
    encode_all(pipe, Cache(tmp_path), offload=True)
    assert moves == []
