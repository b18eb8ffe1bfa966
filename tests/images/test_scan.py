import unicodedata

import pytest
from PIL import Image

from lora_lab.errors import InputError
from lora_lab.images.scan import find_pictures, leads_out, same_names, unsupported


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def test_pictures_come_in_natural_order_from_every_folder_below(tmp_path):
    put(tmp_path, "image_10.png", "image_2.PNG", "image_1.jpeg", "side/a.webp", "b.tif", "c.TIFF", "d.bmp", "e.JPG")
    put(tmp_path, "metadata.jsonl", "image_1.txt", "Thumbs.db", "f.gif")
    names = ["b.tif", "c.TIFF", "d.bmp", "e.JPG", "image_1.jpeg", "image_2.PNG", "image_10.png", "side/a.webp"]
    assert list(find_pictures(tmp_path)) == names


def test_hidden_files_and_folders_are_ignored(tmp_path):
    put(tmp_path, "a.png", "._a.png", ".thumbnails/a.png", "__MACOSX/._a.png", "in/.cache/b.png")
    assert list(find_pictures(tmp_path)) == ["a.png"]


def test_a_name_unpacked_on_macos_is_found_under_its_composed_form(tmp_path):
    on_disk = unicodedata.normalize("NFD", "두부.png")
    Image.new("RGB", (4, 4)).save(tmp_path / on_disk)
    ((name, path),) = find_pictures(tmp_path).items()
    assert name == unicodedata.normalize("NFC", "두부.png") != on_disk
    assert Image.open(path).size == (4, 4)


def test_names_that_one_caption_cannot_tell_apart_are_reported(tmp_path):
    put(tmp_path, "Cat.png", "cat.png", "dog.png", unicodedata.normalize("NFC", "두부.png"))
    put(tmp_path, unicodedata.normalize("NFD", "두부.png"))
    assert same_names(tmp_path) == (["두부.png"], [("Cat.png", "cat.png")])


@pytest.mark.parametrize("missing", ["nowhere", "file.png"])
def test_a_root_that_is_not_a_folder_is_refused_by_name(tmp_path, missing):
    put(tmp_path, "file.png")
    with pytest.raises(InputError, match=rf"{missing} .*point dataset.root at a folder"):
        find_pictures(tmp_path / missing)


def test_a_folder_of_phone_pictures_says_to_convert_them(tmp_path):
    put(tmp_path, "IMG_2.HEIC", "IMG_10.heic", "x.gif")
    assert unsupported(tmp_path) == ["IMG_2.HEIC", "IMG_10.heic", "x.gif"]
    with pytest.raises(InputError, match=r"no pictures in .*IMG_2\.HEIC .*convert them to PNG"):
        find_pictures(tmp_path)


def test_a_link_leads_out_of_the_folder_by_where_it_ends(tmp_path):
    root, outside = put(tmp_path / "data", "in/a.png"), put(tmp_path / "data2", "b.png")
    links = {
        "inside": "in/a.png", "folder": "in", "dangling_inside": "in/none.png", "around": "../data/in/a.png",
        "outside": "../data2/b.png", "dangling": "../none", "absolute": "/etc/passwd", "sibling": "../data2",
        "chain": "outside", "loop": "loop",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    (tmp_path / "alias").symlink_to(root)
    for folder in (root, tmp_path / "alias"):
        outward = {name for name in links if leads_out(folder / name, folder)}
        assert outward == {"outside", "dangling", "absolute", "sibling", "chain"}
        assert leads_out(folder / "sibling" / "b.png", folder)
        assert not leads_out(folder / "folder" / "a.png", folder) and not leads_out(folder / "in/a.png", folder)
    assert outside.is_dir()
