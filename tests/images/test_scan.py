import os
import sys
import unicodedata

import pytest
from PIL import Image

from lora_lab.errors import InputError
from lora_lab.images.scan import FORMATS, find_pictures, leads_out, natural_key, same_but_case, scan


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def test_pictures_come_in_natural_order_from_every_folder_below(tmp_path):
    put(tmp_path, "image_10.png", "image_2.PNG", "image_1.jpeg", "side/a.webp", "b.tif", "c.TIFF", "d.bmp", "e.JPG")
    put(tmp_path, "metadata.jsonl", "image_1.txt", "Thumbs.db", "f.psd")
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
    contents = scan(tmp_path)
    assert contents.same_name == ["두부.png"] and same_but_case(contents.images) == [("Cat.png", "cat.png")]


@pytest.mark.parametrize("missing", ["nowhere", "file.png"])
def test_a_root_that_is_not_a_folder_is_refused_by_name(tmp_path, missing):
    put(tmp_path, "file.png")
    with pytest.raises(InputError, match=rf"{missing} .*point dataset.root at a folder"):
        find_pictures(tmp_path / missing)


def test_a_folder_of_phone_pictures_says_what_reads_them(tmp_path, monkeypatch):
    put(tmp_path, "IMG_2.HEIC", "IMG_10.heif", "x.svg")
    assert list(find_pictures(tmp_path)) == ["IMG_2.HEIC", "IMG_10.heif"]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    assert scan(tmp_path).images == {} and list(scan(tmp_path).left_out) == ["IMG_2.HEIC", "IMG_10.heif", "x.svg"]
    with pytest.raises(InputError, match=r"IMG_2\.HEIC is a HEIC image: pip install .lora_lab\[heif\]"):
        find_pictures(tmp_path)


def test_every_entry_of_a_folder_is_an_image_or_left_out_with_a_reason_or_may_be_a_caption(tmp_path):
    root, outside = tmp_path / "data", put(tmp_path / "outside", "b.png", "deep/c.png")
    read = {f"image{number}{form(suffix)}" for number, suffix in enumerate(FORMATS) for form in (str.lower, str.upper)}
    folders = ("@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", ".thumbnails", "__MACOSX", ".git", "in/@EADIR")
    put(root, *read, *(f"{folder}/a.png" for folder in folders), ".hidden.png", "in/a.png")
    put(root, "Thumbs.db", ".DS_Store", "desktop.ini", "._a.png", "in/._b.jpg")  # of systems: not even named
    reasons = {
        "hidden": {".thumbnails/", ".git/", ".hidden.png"},
        "operating system": {f"{folder}/" for folder in folders if not folder.startswith(".")},
        "format that is not read": {"draw.SVG", "raw.Cr2", "in/layers.psd"},
        "leads out": {"more/", "linked.png", "gone.png"},
        "link to nothing": {"loop", "lost.png"},
        "read there": {"again/", "self/"},
        "FIFO, socket or device": {"pipe.png"},
    }
    put(root, *reasons["format that is not read"], "notes.md", "a.png~")
    links = {
        "more": outside, "linked.png": outside / "b.png", "gone.png": "../nowhere.png", "loop": "loop",
        "lost.png": "nowhere.png", "again": "in", "self": ".", "copy.png": "in/a.png",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe.png")
    contents = scan(root)
    assert set(contents.images) == read | {"in/a.png", "copy.png"} and set(contents.others) == {"notes.md", "a.png~"}
    for reason, names in reasons.items():
        assert {name for name, text in contents.left_out.items() if reason in text} == names
    assert set(contents.left_out) == set().union(*reasons.values())
    followed = scan(root, follow_links=True)
    assert set(followed.images) - set(contents.images) == {"linked.png", "more/b.png", "more/deep/c.png"}


def test_a_link_to_a_folder_above_does_not_lead_round_in_circles(tmp_path):
    put(tmp_path / "data", "a.png")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    (tmp_path / "data" / "up2").symlink_to(tmp_path)
    put(tmp_path, "b.png")
    contents = scan(tmp_path / "data", follow_links=True)
    assert set(contents.images) == {"a.png", "up/b.png"} and {"up/data/", "up2/"} == set(contents.left_out)


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a\nb.png", b"\x1b[31mred.png", "a\u202egnp.png".encode()])
def test_an_image_whose_name_is_not_text_is_refused_by_a_name_that_is(tmp_path, name):
    (tmp_path / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(InputError, match=r"\\(x|u).*rename the file") as refused:
        find_pictures(tmp_path)
    assert str(refused.value).isprintable()


def test_a_name_of_thousands_of_digits_is_in_natural_order(tmp_path):
    names = [f"{'9' * 200}.png", f"{'0' * 20}{'9' * 201}.png", "10.png", "9.png"]
    put(tmp_path, *names)
    assert list(find_pictures(tmp_path)) == ["9.png", "10.png", *names[:2]]
    assert natural_key("9" * 5000) < natural_key("1" + "0" * 5000)


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
