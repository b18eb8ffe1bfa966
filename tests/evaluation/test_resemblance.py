"""Resemblance: the formulas on made-up parts, captions and pixels, and which images are the references."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import normalize

from lora_lab.adapters.files import save_lora
from lora_lab.errors import InputError
from lora_lab.evaluation.resemblance import (
    Colours,
    OwnParts,
    attributes_kept,
    attributes_of,
    clean,
    colours_kept,
    mean_scores,
    references_of,
    structure,
)
from lora_lab.launch.config import compose
from lora_lab.runs import hash_files

# A face that every drawing has, a flower and a box that only the character has, hats that come and go.
FACE, FLOWER, BOX, HAT, CAP = torch.eye(5)


def parts_of(*images):
    return torch.stack([torch.stack(image) for image in images])


REFERENCES = parts_of((FACE, FLOWER, BOX, HAT), (BOX, FLOWER, FACE, CAP), (FACE, BOX, CAP, FLOWER))
BASE = parts_of((FACE, HAT, CAP, FACE), (CAP, FACE, FACE, HAT))


def share(*images, references=REFERENCES, base=BASE):
    return OwnParts.of(references, base).share(parts_of(*images)).tolist()


def test_an_image_shows_as_much_of_the_character_as_it_has_of_its_own_parts():
    all_of_it, half, none = share((FACE, FLOWER, BOX, CAP), (FACE, FLOWER, HAT, CAP), (FACE, HAT, CAP, HAT))
    assert all_of_it == pytest.approx(1) and half == pytest.approx(0.5) and none == 0


def test_images_of_the_base_show_nothing_and_other_references_all_of_the_character():
    images = torch.randn((8, 6, 16), generator=torch.Generator().manual_seed(0))
    images[:5, :2] += 4  # what the references have in common
    own = OwnParts.of(images[:5], images[5:])
    assert own.share(images[5:]).tolist() == [0, 0, 0]
    assert own.share(images[:5]).min() > 0.8


def test_a_single_reference_and_references_like_the_base_have_a_share_too():
    assert share((FACE, FLOWER, BOX, HAT), (FACE, HAT, CAP, HAT), references=REFERENCES[:1]) == [pytest.approx(1), 0]
    assert share((FACE, FLOWER, BOX, HAT), references=BASE[:1]) == [0]


@pytest.mark.parametrize(
    ("prompt", "attributes"),
    [
        ("A TOFU with a green background, with red hair, smiling", ["green background", "red hair", "smiling"]),
        ("TOFU", []),
        ("A TOFU sitting on a bench in a park and holding a cup", ["sitting", "bench", "park", "cup"]),
        ("A TOFU, smiling, smiling.", ["smiling"]),
    ],
)  # fmt: skip
def test_a_prompt_has_attributes(prompt, attributes):
    assert attributes_of(prompt, "TOFU") == attributes


@pytest.mark.parametrize(
    ("prompt", "caption", "kept"),
    [
        ("a TOFU with red hair, smiling", "a TOFU smiling, with red hair", [1, 1]),
        ("a TOFU with red hair, smiling", "a TOFU with red shoes, with black hair", [0.5, 0]),
        ("a TOFU with round glasses", "a TOFU", [0]),
        ("a TOFU", "a TOFU with a hat", []),
    ],
)
def test_an_attribute_is_kept_by_its_words_in_one_attribute_of_the_caption(prompt, caption, kept):
    assert [*attributes_kept(prompt, caption, "TOFU").values()] == kept


def drawing(background, subject, shirt):
    image = Image.new("RGB", (96, 96), background)
    draw = ImageDraw.Draw(image)
    draw.ellipse((24, 16, 72, 64), subject)
    draw.rectangle((16, 64, 80, 96), shirt)
    return image


def test_colours_are_kept_by_region():
    photo = Colours.of(drawing("green", "pink", "blue"))
    other_background = colours_kept(photo, Colours.of(drawing("orange", "pink", "blue")))
    other_subject = colours_kept(photo, Colours.of(drawing("green", "yellow", "red")))
    same = colours_kept(photo, photo)
    assert all(value == pytest.approx(1, abs=1e-3) for value in same.values()) and len(same) == 2
    assert other_background["colours of the background"] < 0.3 < 0.7 < other_background["colours of the subject"]
    assert other_subject["colours of the subject"] < 0.3 < 0.7 < other_subject["colours of the background"]


def test_a_shade_is_nearer_than_another_colour():
    photo = Colours.of(drawing("#44aa66", "pink", "blue"))
    shades = [colours_kept(photo, Colours.of(drawing(colour, "pink", "blue"))) for colour in ("#55b877", "purple")]
    assert shades[0]["colours of the background"] > 0.6 > 0.2 > shades[1]["colours of the background"]


def test_structure_sees_where_parts_are_alike_and_not_what_they_are():
    generator = torch.Generator().manual_seed(0)
    layout = torch.randint(3, (36,), generator=generator)
    first, second = (normalize(torch.randn((3, 8), generator=generator), dim=-1)[layout] for _ in range(2))
    shuffled = second[torch.randperm(36, generator=generator)]
    assert structure(first, first) == pytest.approx(1)
    assert structure(first, second) > 0.8 > 0.3 > structure(first, shuffled)


def test_noise_is_not_clean():
    known = normalize(torch.eye(12)[:4].reshape(2, 2, 12), dim=-1)
    noise = normalize(torch.eye(12)[8:].reshape(2, 2, 12) + 0.1, dim=-1)
    assert clean(known[:1], known, 1.0).tolist() == [1] and clean(noise, known, 1.0).max() < 0.2


def test_the_mean_of_images_has_an_interval():
    scores = [{"character": c, "kept": 0.5, "resemblance": c / 2} for c in (0.2, 0.4, 0.6, 0.8)]
    means = mean_scores(scores)
    assert [*means] == ["resemblance", "kept", "character"] and means["character"].value == 0.5
    assert 0.2 < means["character"].low < 0.5 < means["character"].high < 0.8
    assert means["kept"].low == means["kept"].high == 0.5


@pytest.fixture
def folder(tmp_path):
    """130 images."""
    (tmp_path / "images").mkdir()
    for i in range(130):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / "images" / f"{i:03d}.png")
    return tmp_path / "images"


@pytest.fixture
def lora_of(tmp_path):
    """A LoRA file that says which images it was trained on; with None one of another program."""

    def made(files):
        comment = {"ss_training_comment": f"lora_lab 0.1, dataset {hash_files(*files)}"} if files else {}
        return save_lora(tmp_path / "own.safetensors", {"a": torch.ones(1)}, torch.float32, comment)

    return made


def test_the_references_are_the_images_that_the_lora_was_trained_on(folder, lora_of, capsys):
    files, dataset = sorted(folder.glob("*.png")), compose("dataset=folder", f"dataset.root={folder}").dataset
    found = references_of(lora_of(files), dataset, "HANA_TOFU")
    assert [file.stem for file in found[:3]] == ["000", "003", "006"] and len(found) == 44, "every third of 130"
    assert references_of(lora_of(None), dataset, "HANA_TOFU") == found, (
        "the user's folder counts for another program's file"
    )
    assert capsys.readouterr() == ("", "")
    assert references_of(lora_of(files[1:]), dataset, "HANA_TOFU") == found
    assert "was trained on other images than" in "".join(capsys.readouterr())
    demo = compose().dataset
    for trained_on in (files, None):
        assert references_of(lora_of(trained_on), demo, "HANA_TOFU") == [], "the default folder is nobody's choice"
    assert references_of(lora_of(files), compose("dataset=folder").dataset, "HANA_TOFU") == []
    with pytest.raises(InputError, match="missing"):
        references_of(lora_of(None), compose("dataset=folder", "dataset.root=missing").dataset, "HANA_TOFU")
