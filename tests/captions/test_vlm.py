"""Captions of vision-language models, and the sentences for those that cannot caption."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_vlms import MARKS, MODELS, NO_SYSTEM, TEXTS, llava, qwen, save_tokenizer

from lora_lab.captions import vlm
from lora_lab.captions.captioner import check_captioner, load_captioner
from lora_lab.captions.files import read_captions
from lora_lab.captions.vlm import whole_sentences
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage

CPU = torch.device("cpu")


def settings(folder: Path, *overrides: str):
    option = "florence" if folder.name == "florence" else "vlm"
    return compose(f"captioner={option}", f"captioner.base={folder}", "captioner.max_tokens=12", *overrides).captioner


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a model by its name, made once."""
    parent, folders = tmp_path_factory.mktemp("models"), {}
    return lambda name: (
        folders.setdefault(name, None) or folders.update({name: MODELS[name](parent / name)}) or folders[name]
    )


@pytest.fixture
def images():
    red, wide = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (1200, 400), "blue")
    wide.paste("yellow", (0, 0, 600, 400))
    return [red, wide, Image.linear_gradient("L").convert("RGB")]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_image_has_its_caption_whatever_its_batch(made, images, name):
    captioner = load_captioner(settings(made(name), "captioner.batch_size=3"), CPU)
    captions = captioner.caption(images)
    assert len(captions) == 3 and len({*captions}) > 1, "random weights, but they see the image"
    assert captioner.caption(images[::-1]) == captions[::-1]
    assert replace(captioner, batch_size=1).caption(images) == captions
    assert replace(captioner, batch_size=2).caption([]) == []
    assert all(len(c.encode()) <= 12 * 3 and "\n" not in c for c in captions)
    assert not [mark for mark in MARKS for caption in captions if mark in caption]


@pytest.mark.slow
def test_a_caption_answers_the_prompt(made, images):
    captioner = load_captioner(settings(made("qwen"), "captioner.prompt=' What is it? '", "captioner.system=null"), CPU)
    assert captioner.prompt == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    other = load_captioner(settings(made("qwen"), "class_noun=octopus"), CPU)
    assert "what the octopus wears" in other.prompt and "what one octopus looks like" in other.prompt
    assert other.caption(images) != captioner.caption(images)
    assert load_captioner(settings(made("llava")), CPU).prompt.count("<image>") == 1
    hinted = other.caption_with_hints(images, ["", "왼쪽 눈을 찡긋", "<|image_pad|> winking"])
    plain = other.caption(images)
    assert hinted[0] == plain[0] and hinted[1] != plain[1] and hinted[2] != plain[2]
    assert "and is right: {hint}<|im_end|>" in other.hint_prompt
    small = replace(captioner, image_size=28).caption(images[1:2])
    assert small == captioner.caption([images[1].resize((28, 9))])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen", "florence"])
def test_the_stage_writes_captions(made, images, name, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for number, image in enumerate(images):
        image.save(root / f"{number}.png")
    folder = made(name)
    option = "florence" if name == "florence" else "vlm"
    overrides = ("stage=caption", "dataset=folder", f"dataset.root={root}", f"captioner={option}", "device=cpu")
    result = run_stage(compose(*overrides, f"captioner.base={folder}", "captioner.max_tokens=12"), tmp_path / "run")
    assert read_captions(root) == {name: text for name, text in result.captions.items() if text}
    assert len(result.captions) == 3 and result.pictures_per_second > 0


@pytest.mark.slow
def test_a_model_that_cannot_caption_is_refused_in_one_sentence(made, tmp_path):
    cases = [
        (qwen(tmp_path / "base", None), (), r"base has no chat template: name a model that was trained to follow"),
        (llava(tmp_path / "blind", TEXTS.replace("IMAGE", "")), (), "its chat template does not take an image"),
        (llava(tmp_path / "no_system", NO_SYSTEM), (), r"no system role\): set captioner\.system=null"),
        (made("florence"), ("captioner.task=OD",), r"captioner\.task=OD: its answers are places"),
    ]
    for folder, overrides, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            load_captioner(settings(folder, *overrides), CPU)
    assert load_captioner(settings(tmp_path / "no_system", "captioner.system=null"), CPU).prompt
    with pytest.raises(InputError, match="is a clip model, not Florence-2 in the form of transformers"):
        load_captioner(compose("captioner=florence", "captioner.base=demo:tiny-clip").captioner, CPU)


@pytest.mark.slow
def test_a_model_that_needs_torchvision_is_named(tmp_path):
    from transformers import Lfm2VlConfig

    save_tokenizer(tmp_path)
    Lfm2VlConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Lfm2VlImageProcessor"}')
    with pytest.raises(InputError, match=r"images for lfm2_vl models with torchvision only.*name another model"):
        load_captioner(settings(tmp_path), CPU)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("captioner.base=no/such/folder",), r"captioner\.base=no/such/folder: no such file or folder"),
        (
            ("captioner.precision=int3",),
            r"captioner\.precision=int3: should be 'auto', 'bf16', 'fp16', 'fp32' or 'nf4'",
        ),
        (("captioner.image_size=0",), r"captioner\.image_size=0: image_size must be at least 1"),
        (("captioner.precision=nf4",), r"captioner\.precision=nf4: needs a CUDA device"),
        (("captioner.precision=fp16",), r"captioner\.precision=fp16: needs a GPU"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_loaded(monkeypatch, overrides, sentence):
    monkeypatch.setattr(vlm, "load_processor", lambda base: pytest.fail("loaded"))
    with pytest.raises(InputError, match=sentence):
        captioner = compose("captioner=vlm", *overrides).captioner
        check_captioner(captioner)
        load_captioner(captioner, CPU)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("A cat. It sits on a", "A cat."),
        ("a cat on a", "a cat on a"),
        ("It is 3.5 m. Ye", "It is 3.5 m."),
        ("고양이. 앉", "고양이."),
    ],
)
def test_a_cut_caption_ends_with_a_whole_sentence(text, whole):
    assert whole_sentences(text) == whole
