"""Masks: found by name, of their picture's size, and refused by name where they are not."""

import pytest
from PIL import Image

from lora_lab.errors import InputError
from lora_lab.images.dataset import find_masks


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "masks"
    (root / "sub").mkdir(parents=True)
    return root


def half(size=(8, 4), mode="L"):
    """The left half white, the right black."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask.convert(mode)


def opened(folder, name, size=(8, 4), path=None):
    return find_masks(str(folder)).open(name, path or folder / "none", size)


def test_a_mask_has_its_pictures_name_whatever_the_suffixes(folder):
    half().save(folder / "a.png")
    half(mode="RGB").save(folder / "sub" / "b.1.webp", lossless=True)
    half(mode="1").save(folder / "c.tif")
    for name in ("a.jpg", "sub/b.1.png", "c.png"):
        mask = opened(folder, name)
        assert mask.mode == "L" and list(mask.crop((3, 0, 5, 1)).tobytes()) == [255, 0], name


def test_transparent_pixels_of_a_mask_are_not_trained_on(folder):
    mask = Image.new("RGBA", (8, 4), (255, 255, 255, 0))
    mask.putpixel((0, 0), (255, 255, 255, 255))
    mask.save(folder / "a.png")
    assert opened(folder, "a.png").getbbox() == (0, 0, 1, 1)


def test_an_alpha_mask_is_the_alpha_channel_of_the_image(tmp_path):
    picture = Image.new("RGBA", (8, 4), "red")
    picture.putalpha(half())
    picture.save(tmp_path / "a.png")
    mask = find_masks("alpha").open("a.png", tmp_path / "a.png", (8, 4))
    assert mask.tobytes() == half().tobytes()
    assert find_masks("none") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d.png", ["masks has no mask for d.png", "add d.png, white where it is learnt"]),
        ("sub/a.png", ["has no mask for sub/a.png", "add sub/a.png"]),
        ("small.png", ["small.png is 4x4, but small.png is 8x4"]),
        ("black.png", ["black.png is black all over", "remove the picture"]),
        ("broken.png", ["broken.png is not a picture"]),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(folder, name, words):
    half().save(folder / "a.png")
    half((4, 4)).save(folder / "small.png")
    Image.new("L", (8, 4)).save(folder / "black.png")
    (folder / "broken.png").write_text("no picture")
    with pytest.raises(InputError) as caught:
        opened(folder, name)
    for word in words:
        assert word in str(caught.value)


def test_a_picture_without_transparency_has_no_alpha_mask(tmp_path):
    half(mode="RGB").save(tmp_path / "whole.png")
    Image.new("RGBA", (8, 4)).save(tmp_path / "nothing.png")
    for name, words in (("whole", "whole.png has no alpha channel"), ("nothing", "transparent all over")):
        with pytest.raises(InputError, match=words):
            find_masks("alpha").open(f"{name}.png", tmp_path / f"{name}.png", (8, 4))


def test_a_file_and_ambiguous_mask_names_are_refused(folder):
    with pytest.raises(InputError, match=r"no pictures in .*: point loss\.mask at"):
        find_masks(str(folder))
    half().save(folder / "a.png")
    half().save(folder / "a.webp")
    with pytest.raises(InputError, match=r"two masks of one name, a\.png and a\.webp"):
        find_masks(str(folder))
    with pytest.raises(InputError, match="this is a file"):
        find_masks(str(folder / "a.png"))
    with pytest.raises(InputError, match="no such file or folder"):
        find_masks(str(folder / "nowhere"))
