"""A LoRA file is attached within a context, and the base is unchanged afterwards."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from sdxl_structure import NARROW, outputs, pipeline

from lora_lab.adapters.files import find_lora, kohya_state, save_lora
from lora_lab.adapters.inject import adapters_disabled, lora_attached
from lora_lab.base.sdxl import SDXL
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.sampling.generate import Request, generate

UNET = ["to_q", "to_v"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def teacher(folder):
    """A pipeline with random LoRAs in all three networks, its picture of the world, and its two files."""
    pipe = pipeline(NARROW)
    torch.manual_seed(1)
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    for name, part in parts.items():
        targets = UNET if name == "unet" else TEXT
        part.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    save_lora(folder / "kohya.safetensors", kohya_state(parts, SDXL.lora_key), torch.float32, {})
    text = {name: part for name, part in parts.items() if name != "unet"}
    save_lora(folder / "text.safetensors", kohya_state(text, SDXL.lora_key), torch.float32, {})
    pipe.save_lora_weights(
        folder / "diffusers",
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        text_encoder_2_lora_layers=get_peft_model_state_dict(pipe.text_encoder_2),
    )
    return pipe


@pytest.fixture(scope="module")
def shared():
    return pipeline(NARROW)


@pytest.fixture
def pipe(shared):
    """The base; what a test leaves on it fails that test."""
    before, keys = outputs(shared), shared.unet.state_dict().keys()
    yield shared
    assert same(outputs(shared), before)
    assert shared.unet.state_dict().keys() == keys
    assert not shared.get_list_adapters()
    assert not any(p.requires_grad for p in shared.unet.parameters())


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("file", ["kohya.safetensors", "diffusers/pytorch_lora_weights.safetensors"])
def test_the_base_with_the_file_is_bit_identical_to_the_trained_one(pipe, teacher, folder, file):
    with lora_attached(SDXL(pipe), folder / file):
        assert same(outputs(pipe), outputs(teacher))


@pytest.mark.parametrize("nothing", [(None, 1.0), ("kohya.safetensors", 0.0)])
def test_no_file_or_no_weight_is_the_base(pipe, teacher, folder, nothing):
    name, weight = nothing
    before = outputs(pipe)
    with lora_attached(SDXL(pipe), name and folder / name, weight):
        assert same(outputs(pipe), before)


def test_half_the_weight_is_between_the_base_and_the_trained_one(pipe, teacher, folder):
    base, whole = outputs(pipe), outputs(teacher)
    with lora_attached(SDXL(pipe), folder / "kohya.safetensors", 0.5):
        half = outputs(pipe)
    for before, between, after in zip(base, half, whole, strict=True):  # in both encoders as in the UNet
        assert 0 < (between - before).norm() < (after - before).norm()
        assert 0 < (after - between).norm() < (after - before).norm()


def test_an_error_while_sampling_leaves_the_base_clean(pipe, teacher, folder):
    with pytest.raises(KeyboardInterrupt), lora_attached(SDXL(pipe), folder / "kohya.safetensors"):
        raise KeyboardInterrupt


def training_pipe():
    pipe = pipeline(NARROW)
    torch.manual_seed(2)
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_k"], init_lora_weights=False))
    return pipe


def test_adapters_disabled_gives_the_base_and_keeps_requires_grad(shared):
    base, pipe = outputs(shared), training_pipe()
    frozen = LoraConfig(r=3, lora_alpha=3, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.unet.add_adapter(frozen, "start")
    pipe.unet.set_adapter(["default", "start"])
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_(".default." in name)
    mine = outputs(pipe)
    with pytest.raises(ZeroDivisionError), adapters_disabled(pipe.unet):
        assert same(outputs(pipe), base)
        raise ZeroDivisionError
    assert same(outputs(pipe), mine) and pipe.unet.active_adapters() == ["default", "start"]
    assert all(p.requires_grad == (".default." in name) for name, p in pipe.unet.named_parameters())


@pytest.mark.slow
def test_training_is_unchanged_after_a_file_was_attached(shared, teacher, folder):
    base, pipe = outputs(shared), training_pipe()
    mine = outputs(pipe)
    learning = {name for name, p in pipe.unet.named_parameters() if p.requires_grad}
    weights = {name: p.detach().clone() for name, p in pipe.unet.named_parameters() if p.requires_grad}
    with lora_attached(SDXL(pipe), None):
        assert same(outputs(pipe), base)
    with lora_attached(SDXL(pipe), folder / "kohya.safetensors", 0.0):
        assert same(outputs(pipe), base)
    with pytest.raises(ZeroDivisionError), lora_attached(SDXL(pipe), folder / "kohya.safetensors"):
        assert same(outputs(pipe), outputs(teacher))
        raise ZeroDivisionError
    with lora_attached(SDXL(pipe), folder / "text.safetensors"):
        words = outputs(pipe)
        assert same(words[:2], outputs(teacher)[:2])
    with lora_attached(SDXL(shared), folder / "text.safetensors"):
        assert same(words, outputs(shared))
    assert same(outputs(pipe), mine)
    assert {name for name, p in pipe.unet.named_parameters() if p.requires_grad} == learning
    assert pipe.get_list_adapters() == {"unet": ["default"]}
    assert all(torch.equal(p, weights[name]) for name, p in pipe.unet.named_parameters() if name in weights)
    sum(p.sum() for p in pipe.unet.parameters() if p.requires_grad).backward()
    assert all(p.grad is not None for name, p in pipe.unet.named_parameters() if name in learning)


def broken_files(folder):
    kohya = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    (folder / "garbage.safetensors").write_bytes(b"not tensors at all" * 9)
    (folder / "empty.safetensors").write_bytes(b"")
    save_file({"weight": torch.zeros(2)}, str(folder / "no-lora.safetensors"))
    wide = {f"{kohya}.lora_down.weight": torch.zeros(4, 640), f"{kohya}.lora_up.weight": torch.zeros(640, 4)}
    save_file({**wide, f"{kohya}.alpha": torch.tensor(4.0)}, str(folder / "wider.safetensors"))
    foreign = {key.replace("down_blocks_1", "down_blocks_7"): value for key, value in wide.items()}
    save_file(foreign, str(folder / "foreign.safetensors"))
    return ["garbage", "empty", "no-lora", "wider", "foreign"]


def test_a_file_that_does_not_fit_is_named_and_leaves_the_base_clean(pipe, tmp_path):
    before = outputs(pipe)
    for name in broken_files(tmp_path):
        file = tmp_path / f"{name}.safetensors"
        with pytest.raises(InputError, match=rf"{name}\.safetensors: does not fit"), lora_attached(SDXL(pipe), file):
            raise AssertionError("drew with a broken file")
        assert same(outputs(pipe), before), name


def test_a_file_that_does_not_fit_leaves_training_as_it_was(tmp_path):
    pipe = training_pipe()
    mine = outputs(pipe)
    for name in broken_files(tmp_path):
        with pytest.raises(InputError, match=name), lora_attached(SDXL(pipe), tmp_path / f"{name}.safetensors"):
            raise AssertionError("drew with a broken file")
        assert same(outputs(pipe), mine), name
        assert pipe.get_list_adapters() == {"unet": ["default"]}


# --- find_lora


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "lora").mkdir(parents=True)
    return tmp_path


def test_find_lora_takes_a_file_or_a_name_in_models(at_work):
    for file in (at_work / "mine.safetensors", at_work / "models" / "lora" / "HANA_TOFU.safetensors"):
        file.write_bytes(b"x")
    assert find_lora("mine.safetensors").samefile("mine.safetensors")
    assert find_lora("HANA_TOFU").samefile("models/lora/HANA_TOFU.safetensors")


def test_find_lora_takes_a_run_folder_even_after_a_move(at_work):
    run = at_work / "run"
    (run / "lora").mkdir(parents=True)
    for name in ("TOFU-000010", "TOFU", "TOFU-000020"):
        (run / "lora" / f"{name}.safetensors").write_bytes(b"x")
    (run / "result.json").write_text(json.dumps({"lora": str(run / "lora" / "TOFU.safetensors")}))
    assert find_lora("run") == run / "lora" / "TOFU.safetensors"
    run.rename(at_work / "moved")
    assert find_lora("moved").resolve() == at_work / "moved" / "lora" / "TOFU.safetensors"


def test_find_lora_takes_the_newest_snapshot_of_an_unfinished_run(at_work):
    folder = at_work / "run" / "lora"
    folder.mkdir(parents=True)
    for step in (100, 200, 20):
        (folder / f"TOFU-{step:06d}.safetensors").write_bytes(b"x")
    assert find_lora("run").name == "TOFU-000200.safetensors"


def test_a_folder_without_a_lora_and_an_unknown_name_are_refused(at_work):
    (at_work / "run").mkdir()
    with pytest.raises(InputError, match="lora=run: this folder has no finished LoRA"):
        find_lora("run")
    with pytest.raises(InputError, match="none yet: train one"):
        find_lora("HANA_TOFU")
    (at_work / "models" / "lora" / "HANA_TOFU.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="did you mean HANA_TOFU"):
        find_lora("HANA_TOFO")
    with pytest.raises(InputError, match=r"models.lora has HANA_TOFU"):
        find_lora("zebra")


@pytest.mark.slow
def test_images_of_several_weights_are_those_of_the_file_attached_with_each(pipe, teacher, folder):
    """The file also changes the text encoders, so the prompts are encoded for each weight."""
    file, sampler = folder / "kohya.safetensors", compose("sampler.steps=3").sampler
    request, base = Request("a star", 0, (32, 32)), SDXL(pipe)

    def drawn(lora=None, *requests):
        return [np.asarray(image) for image in generate(base, list(requests), sampler, lora=lora)]

    alone = {}
    for weight in (1.0, 0.5):
        with lora_attached(base, file, weight):
            (alone[weight],) = drawn(None, request)
    with lora_attached(base, file) as lora:
        weights = [replace(request, lora_weight=weight) for weight in (1.0, 0.5, 1.0)]
        together = drawn(lora, *weights)
        late, early, constant = (
            drawn(lora, replace(weights[0], lora_schedule=factors))[0] for factors in ((0, 1), (1, 0), (1, 1, 1))
        )
    for image, weight in zip(together, (1.0, 0.5, 1.0), strict=True):
        assert np.array_equal(image, alone[weight])
    assert np.array_equal(constant, alone[1.0]) and not np.array_equal(alone[0.5], alone[1.0])
    assert not any(np.array_equal(*pair) for pair in ((late, early), (late, constant), (early, constant)))
