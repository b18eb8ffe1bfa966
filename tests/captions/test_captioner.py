"""The bundled captioner on the bundled pictures, and what is said when a captioner can't be loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

import lora_lab
from lora_lab.captions.captioner import clean_decoding, load_captioner
from lora_lab.captions.files import read_captions
from lora_lab.captions.rules import Rules, refine
from lora_lab.errors import InputError

DEMO = Path(lora_lab.__file__).parent / "demo"
CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="module")
def truth():
    return read_captions(DEMO / "tofu")


@pytest.fixture(scope="module")
def tofu(truth):
    return [Image.open(DEMO / "tofu" / name).convert("RGB") for name in truth]


@pytest.fixture(scope="module")
def captioner():
    return load_captioner(str(DEMO / "tiny-blip"), "cpu", prompt=None, max_tokens=56, beams=4, batch_size=16)


@pytest.fixture(scope="module")
def captions(captioner, tofu):
    return captioner.caption(tofu)


def test_it_sees_the_background_and_the_glasses(captions, truth):
    assert sum("with a purple background" in caption for caption in captions) == 24
    worn = [(_glasses(caption), _glasses(true)) for caption, true in zip(captions, truth.values(), strict=True)]
    assert [bool(ours) for ours, _ in worn] == [bool(true) for _, true in worn]
    assert sum(ours != true for ours, true in worn) <= 1, "of six"


def _glasses(caption):
    return next((phrase for phrase in caption.split(", ") if "glasses" in phrase), "")


def test_its_captions_refined_are_nearly_those_a_person_wrote(captions, truth):
    with initialize_config_dir(str(CONF / "refiner"), version_base="1.3"):
        avatars = Rules.from_config(**OmegaConf.to_container(compose("avatars")))
    refined = [refine(caption, "HANA_TOFU", avatars) for caption in captions]
    different = [
        len(set(ours.split(", ")) ^ set(true.split(", "))) for ours, true in zip(refined, truth.values(), strict=True)
    ]
    assert sum(count == 0 for count in different) >= 16
    assert max(different) <= 2, "one phrase said otherwise counts twice"


def test_a_batch_says_what_one_picture_says(captioner, tofu, captions):
    alone = replace(captioner, batch_size=1)
    assert alone.caption(tofu[:3]) == captions[:3]
    assert alone.caption([]) == []


def test_the_prompt_begins_every_caption_and_max_tokens_ends_it(captioner, tofu):
    prompted = replace(captioner, prompt="a cartoon pink", max_tokens=3, batch_size=2)
    captions = prompted.caption(tofu[:3])
    assert all(caption.startswith("a cartoon pink") for caption in captions)
    assert all(3 < len(caption.split()) <= 6 for caption in captions)


@pytest.mark.parametrize("base", ["no/such/folder", "somebody/not-there"])
def test_a_captioner_that_is_not_there_is_an_input_error(monkeypatch, base):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=rf"can't load the captioner {base}.*captioner.base="):
        load_captioner(base, "cpu", prompt=None, max_tokens=5, beams=1, batch_size=1)


def test_another_kind_of_model_is_refused():
    with pytest.raises(InputError, match="is a clip model, not BLIP"):
        load_captioner(str(DEMO / "tiny-clip"), "cpu", prompt=None, max_tokens=5, beams=1, batch_size=1)


@pytest.mark.parametrize(
    ("decoded", "text"),
    [
        ("a big - head person , smiling", "a big-head person, smiling"),
        ("a hana _ tofu ' s hat .", "a hana_tofu's hat."),
        ("  a   cat  ", "a cat"),
        ("a cat with a blue - green hat", "a cat with a blue-green hat"),
    ],
)
def test_what_the_tokenizer_took_apart_is_joined(decoded, text):
    assert clean_decoding(decoded) == text


@pytest.mark.parametrize("option", ["blip", "blip_tiny"])
def test_the_shipped_options_have_what_the_captioner_needs(option):
    with initialize_config_dir(str(CONF / "captioner"), version_base="1.3"):
        chosen = OmegaConf.to_container(compose(option))
    assert set(chosen) == {"name", "base", "prompt", "max_tokens", "beams", "batch_size"}
    assert chosen["name"] == option
