"""stage=mask: masks that training reads, written one by one; a mask that a person made survives everything."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from lora_lab.demo import TOFU
from lora_lab.errors import InputError
from lora_lab.images.dataset import find_masks
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage


@pytest.fixture
def root(tmp_path):
    """Two tofu on a plain background, one in a subfolder, and a picture without one."""
    folder = tmp_path / "TOFU"
    (folder / "party").mkdir(parents=True)
    shutil.copy(TOFU / "00.png", folder)
    Image.open(TOFU / "07.png").convert("RGB").save(folder / "party" / "07.jpg", quality=95)
    return folder


def do(root, *overrides):
    return run_stage(
        compose("stage=mask", "dataset=folder", f"dataset.root={root}", "device=cpu", *overrides), root.parent / "run"
    )


def masks_in(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}


def test_masks_beside_the_images_are_those_that_training_reads_and_cover_the_subject(root):
    result = do(root)
    folder = root.with_name("TOFU-masks")
    assert result.folder == str(folder) and list(result.masks) == ["00.png", "party/07.jpg"]
    masks = find_masks(str(folder))
    for name in result.masks:
        picture = Image.open(root / name).convert("RGB")
        mask = np.asarray(masks.open(name, root / name, picture.size))
        assert mask[0, 0] == 0 and mask[64, 64] == 255 and 0.3 < (mask > 127).mean() < 0.6
        away = np.abs(np.asarray(picture).astype(int) - picture.getpixel((2, 2))).max(2) > 60
        assert (mask[away] == 255).all(), "nothing that is not background is left out"
    sheet = Image.open(result.sheet)
    assert sheet.width > 3 * 256 and sheet.height > 2 * 256
    inverse = do(root, "stage.subject=background", f"stage.output={root.parent / 'inverse'}", "stage.feather=0")
    drawn = np.asarray(Image.open(inverse.masks["00.png"]))
    assert drawn[0, 0] == 255 and drawn[64, 64] == 0


def test_only_masks_that_are_as_the_program_wrote_them_are_replaced(root):
    folder = root.with_name("TOFU-masks")
    folder.mkdir()
    Image.new("L", (128, 128), 255).save(folder / "00.jpg")
    assert list(do(root).masks) == ["party/07.jpg"]
    before = masks_in(folder)
    assert do(root).masks == {} and masks_in(folder) == before
    assert list(do(root, "stage.mode=replace", "stage.feather=0").masks) == ["party/07.jpg"]
    assert masks_in(folder) != before
    Image.new("L", (128, 128), 9).save(folder / "party" / "07.png")
    assert do(root, "stage.mode=replace").masks == {}, "a person has changed it"
    (folder / "party" / "07.png").unlink()
    with (folder / "masks.jsonl").open("ab") as file:
        file.write(b'{"file_name": "party/0')  # cut off by a crash
    assert list(do(root).masks) == ["party/07.jpg"]
    rows = [json.loads(line) for line in (folder / "masks.jsonl").read_text().splitlines() if line.endswith("}")]
    assert [row["mask"] for row in rows] == ["party/07.png"] * 3


def test_a_picture_without_a_plain_background_is_named_and_the_others_are_masked(root, capsys):
    Image.effect_noise((64, 64), 100).convert("RGB").save(root / "noise.png")
    Image.new("RGB", (64, 64), "red").save(root / "red.png")
    result = do(root)
    assert list(result.masks) == ["00.png", "party/07.jpg"] and list(result.without) == ["noise.png", "red.png"]
    printed = capsys.readouterr().out
    assert "noise.png (no plain background: name a segmentation model" in printed
    assert "red.png (nothing but background" in printed
    with pytest.raises(InputError, match="none of the 2 pictures could be masked"):
        do(root)


def test_nothing_is_written_through_a_link_and_a_linked_mask_stays(root, tmp_path):
    folder, outside = root.with_name("TOFU-masks"), tmp_path / "outside"
    outside.mkdir()
    folder.mkdir()
    Image.new("L", (128, 128), 255).save(outside / "mine.png")
    (folder / "00.png").symlink_to(outside / "mine.png")
    assert list(do(root).masks) == ["party/07.jpg"] and (folder / "00.png").is_symlink()
    shutil.rmtree(folder / "party")
    (folder / "party").symlink_to(outside)
    with pytest.raises(InputError, match="leads out of"):
        do(root)
    assert [path.name for path in outside.iterdir()] == ["mine.png"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stage.output={root}/masks"], "would be read as images"),
        (["stage.output={root}/.."], "would be read as images"),
        (["stage.output={root}/00.png/masks"], "name another folder"),
        (["model.segmenter=nowhere.safetensors", "stage.subject=person"], "model.segmenter=nowhere"),
    ],
)
def test_a_folder_or_model_that_cannot_be_used_is_refused(root, overrides, words):
    with pytest.raises(InputError) as caught:
        do(root, *(override.format(root=root) for override in overrides))
    assert words in str(caught.value)


def test_two_images_of_one_mask_are_refused_and_those_of_the_package_have_masks_in_the_run_folder(root, tmp_path):
    shutil.copy(root / "party" / "07.jpg", root / "party" / "07.webp")
    with pytest.raises(InputError, match=r"07\.jpg and party/07\.webp would have one mask"):
        do(root)
    result = run_stage(compose("stage=mask", "device=cpu"), tmp_path / "bundled")
    assert result.folder == str(tmp_path / "bundled" / "masks") and len(result.masks) == 24


@pytest.mark.slow
def test_a_segmentation_model_finds_the_person(root, tmp_path, capsys):
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], decoder_hidden_size=8, num_attention_heads=[1, 1, 1, 1],
        id2label={0: "wall", 1: "person"}, label2id={"wall": 0, "person": 1},
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config)
    for name, bias in (("person", [0.0, 100.0]), ("wall", [100.0, 0.0])):
        model.decode_head.classifier.bias.data = torch.tensor(bias)
        model.save_pretrained(tmp_path / name)
        SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / name)
    result = do(
        root, "stage.subject=person", f"model.segmenter={tmp_path / 'person'}", f"stage.output={tmp_path / 'm'}"
    )
    assert len(result.masks) == 2 and Image.open(result.masks["00.png"]).getextrema() == (255, 255)
    with pytest.raises(InputError, match="none of the 2 pictures"):
        do(root, "stage.subject=person", f"model.segmenter={tmp_path / 'wall'}", f"stage.output={tmp_path / 'n'}")
    assert "no person that" in capsys.readouterr().out
