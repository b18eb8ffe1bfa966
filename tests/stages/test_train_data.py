"""What of the pictures and captions is trained on: captions, crops, folders, masks, buckets."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import assert_same, cut_out, encoded, lora, metrics, resolved, reworded, train

from lora_lab.errors import InputError
from lora_lab.training.data import latent_mask

pytestmark = pytest.mark.usefixtures("elsewhere")


def texts_of(*overrides: str) -> set[str]:
    """Everything that the six pictures are trained with."""
    return {text for texts in resolved(*overrides).files.texts for orders in texts for text in orders}


def test_captions_are_shuffled_within_bounds_and_dressed():
    plain = texts_of()
    assert len(plain) == 6 and not any("{" in text for text in plain)
    shuffled = texts_of("dataset.shuffle_captions=true", "dataset.keep_tokens=0")
    assert len(shuffled) > len(texts_of("dataset.shuffle_captions=true", "dataset.keep_tokens=0",
                                        "dataset.caption_variants=2")) > 6  # fmt: skip
    fronts = {text.split(", ")[0] for text in plain}
    kept = texts_of("dataset.shuffle_captions=true")
    assert {text.split(", ")[0] for text in kept} == fronts != {text.split(", ")[0] for text in shuffled}
    dressed = texts_of("dataset.caption_prefix='this is {trigger}:'", "dataset.caption_suffix=', flat'")
    assert dressed == {f"this is HANA_TOFU: {text}, flat" for text in plain}


def test_the_trigger_may_stand_in_the_prefix(own_pictures):
    reworded(own_pictures, "HANA_TOFU", "tofu", count=-1)
    with pytest.raises(InputError, match="no caption of the 6 pictures has the trigger HANA_TOFU"):
        resolved(f"dataset.root={own_pictures}")
    resolved(f"dataset.root={own_pictures}", "dataset.caption_prefix='{trigger},'")


def wide_pictures(root: Path) -> Path:
    """Two pictures of 400x120, which cover 160x96 with 160 px to spare, and one that fits."""
    root.mkdir()
    for i, size in enumerate([(400, 120), (400, 120), (128, 128)]):
        Image.effect_noise(size, 90).convert("RGB").save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a HANA_TOFU, {i}")
    return root


def test_random_crops_are_encoded_as_they_are_told(tmp_path):
    root = wide_pictures(tmp_path / "wide")
    masks = wide_pictures(tmp_path / "masks")
    crop = (f"dataset.root={root}", f"loss.mask={masks}", "dataset.random_crop=true", "dataset.flip=true")
    plan, data, base = encoded(*crop, "dataset.crops=3")
    assert [len(example.crops) for example in data.examples] == [3, 3, 1]
    for example, cuts in zip(data.examples, plan.images.crops, strict=True):
        scaled_width = cuts[-1].crop_top_left[1] + cuts[-1].picture.width
        for cut, (upright, mirrored) in zip(cuts, example.crops, strict=True):
            top, left = cut.crop_top_left
            other = scaled_width - cut.picture.width - left
            told = (*cut.original_size, top, left, *cut.target_size)
            assert tuple(upright.conditioning["time_ids"].tolist()) == told
            assert tuple(mirrored.conditioning["time_ids"].tolist()) == (*told[:3], other, *told[4:])
            assert torch.equal(upright.latents, base.encode_image(cut.picture, ""))
            assert torch.equal(mirrored.latents, base.encode_image(ImageOps.mirror(cut.picture), ""))
            assert torch.equal(upright.mask, latent_mask(cut.mask, *upright.latents.shape[1:]))
            assert torch.allclose(mirrored.mask, upright.mask.flip(-1))
    assert not torch.equal(data.examples[0].crops[0][0].mask, data.examples[0].crops[1][0].mask)
    assert [len(cuts) for cuts in resolved(*crop).images.crops] == [4, 4, 1], "dataset.crops is 4 by default"


@pytest.mark.slow
def test_random_crops_change_what_is_learnt_where_there_is_room_for_them(tmp_path, capsys):
    root = f"dataset.root={wide_pictures(tmp_path / 'wide')}"
    train("centre", root, "steps=3")
    train("random", root, "steps=3", "dataset.random_crop=true", "name=random")
    assert "9 of 3 images" in capsys.readouterr().out
    centre, random = lora("centre"), load_file("random/lora/random.safetensors")
    assert any(not torch.equal(centre[key], random[key]) for key in centre)


@pytest.mark.slow
def test_folders_are_shown_as_often_as_they_say(tmp_path, capsys):
    one, two = wide_pictures(tmp_path / "one"), tmp_path / "tofu"
    _, data, _ = encoded(f"dataset.root=[{{root: {one}, repeats: 4}}, {two}]", "dataset.repeats=2")
    shown = [data.examples[i].name for bucket in data.buckets for i in bucket]
    assert {name: shown.count(name) for name in shown} == {
        **{f"one/{i}.png": 4 for i in range(3)}, **{f"{two.resolve().name}/{i:02d}.png": 2 for i in range(6)}
    }  # fmt: skip
    train("run", f"dataset.root=[{{root: {one}, repeats: 4}}, {two}]", "steps=9")
    printed = capsys.readouterr().out
    # 8 and 4 + 6 images an epoch, two a batch
    assert "9 images in" in printed and "one (4 times), " in printed and "9 steps of 2 (1.0 epochs)" in printed


@pytest.mark.slow
def test_one_of_several_captions_is_read_at_a_time(own_pictures, three_steps):
    lines = [json.loads(line) for line in (own_pictures / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["text"] = [line["text"], line["text"]]
    (own_pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train("same", "steps=3", f"dataset.root={own_pictures}")
    assert_same(lora("same"), three_steps)
    for line in lines:
        line["text"][1] = "HANA_TOFU"
    (own_pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train("two", "steps=3", f"dataset.root={own_pictures}", "name=two")
    two = load_file("two/lora/two.safetensors")
    assert any(not torch.equal(two[key], three_steps[key]) for key in two)
    with safe_open("two/lora/two.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ss_tag_frequency"])["HANA_TOFU"]["HANA_TOFU"] == 6
        assert file.metadata()["ss_num_train_images"] == "6"


@pytest.mark.slow
def test_masks_decide_what_of_the_pictures_is_learnt(three_steps, tmp_path, capsys):
    white, left = cut_out(tmp_path / "white", (0, 0, 128, 128)), cut_out(tmp_path / "left", (0, 0, 64, 128))
    train("white", "steps=3", f"loss.mask={white}")
    assert_same(lora("white"), three_steps)
    train("left", "steps=3", f"loss.mask={left}")
    assert "left; the loss outside the mask has weight 0" in capsys.readouterr().out
    assert not torch.equal(*(torch.cat([v.flatten() for v in x.values()]) for x in (lora("left"), three_steps)))
    assert all(one["loss"] < all_of["loss"] for one, all_of in zip(metrics("left"), metrics("white"), strict=True))
    assert "masks" in json.loads(Path("left/manifest.json").read_text())["sha256"]
    train("lenient", "steps=3", f"loss.mask={left}", "loss.unmasked_weight=1")
    assert_same(lora("lenient"), three_steps)


@pytest.mark.slow
def test_pictures_of_several_shapes_are_trained_in_buckets(tmp_path, capsys):
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    for i, size in enumerate([(200, 200), (300, 200), (200, 300), (310, 200)]):
        Image.effect_noise(size, 90).convert("RGB").save(shapes / f"{i}.png")
        (shapes / f"{i}.txt").write_text("a HANA_TOFU")
    train("run", f"dataset.root={shapes}", "steps=4")
    printed = capsys.readouterr().out
    assert "1 of 128x128" in printed and "2 of 160x96" in printed and "1 of 96x160" in printed
    assert all(math.isfinite(line["loss"]) for line in metrics("run"))
