import json
import unicodedata

import pytest
from PIL import Image

from lora_lab.errors import InputError
from lora_lab.images.dataset import apply_caption_affixes, copy_pictures, read_dataset, read_folders


def dataset(root, names, captions=None):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name)
    if captions is not None:
        rows = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items()]
        (root / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return root


def test_pictures_and_captions_are_matched_in_natural_order(tmp_path):
    captions = {"image_10.png": "ten", "image_2.png": "two", "side/image_1.png": "one"}
    dataset(tmp_path, captions, captions)
    samples = read_dataset(tmp_path)
    assert [(sample.name, *sample.captions) for sample in samples] == [
        ("image_2.png", "two"), ("image_10.png", "ten"), ("side/image_1.png", "one"),
    ]  # fmt: skip
    assert samples[2].path == tmp_path / "side" / "image_1.png"


def test_a_name_composed_in_the_captions_meets_its_decomposed_file(tmp_path):
    name = "두부_1.png"
    dataset(tmp_path, [unicodedata.normalize("NFD", name)], {unicodedata.normalize("NFC", name): "A HANA_TOFU"})
    (sample,) = read_dataset(tmp_path)
    assert sample.captions == ("A HANA_TOFU",) and Image.open(sample.path).size == (8, 8)


def test_two_files_of_one_name_are_refused(tmp_path):
    forms = [unicodedata.normalize(form, "두부.png") for form in ("NFC", "NFD")]
    dataset(tmp_path, forms, {"두부.png": "A HANA_TOFU"})
    with pytest.raises(InputError, match=r"두부\.png is in .* twice"):
        read_dataset(tmp_path)
    with pytest.raises(InputError, match=r"두부\.png is in .* twice"):
        copy_pictures(tmp_path, tmp_path.parent / "copy")


def test_a_folder_without_captions_is_refused_with_the_stage_to_run(tmp_path):
    with pytest.raises(InputError, match=r"no captions in .*: run stage=caption first"):
        read_dataset(dataset(tmp_path, ["a.png"]))


def test_a_caption_without_its_picture_names_the_likely_one(tmp_path):
    dataset(tmp_path, ["image_1.jpg", "image_2.png"], {"image_1.png": "one", "image_2.png": "two"})
    with pytest.raises(InputError, match=r"caption for image_1\.png, but no such picture .*: was image_1\.jpg meant\?"):
        read_dataset(tmp_path)


def test_no_captioned_image_is_suggested_for_a_deleted_one(tmp_path):
    dataset(tmp_path, ["image_2.png"], {"image_1.png": "one", "image_2.png": "two"})
    with pytest.raises(InputError, match=r"caption for image_1\.png.*put it back or delete the caption$"):
        read_dataset(tmp_path)


def test_pictures_without_captions_are_counted_and_three_are_named(tmp_path):
    names = [f"{number}.png" for number in range(1, 12)]
    dataset(tmp_path, names, {"1.png": "one"})
    with pytest.raises(InputError, match=r"10 of .*\(2\.png, 3\.png, 4\.png and 7 more\): run stage=caption"):
        read_dataset(tmp_path)


def test_pictures_alone_are_copied_and_the_originals_stay(tmp_path):
    root, to = dataset(tmp_path / "TOFU", ["a.png", "side/b.png"], {"a.png": "a", "side/b.png": "b"}), tmp_path / "new"
    (root / "a.png").chmod(0o444)
    assert copy_pictures(root, to) == 2
    assert sorted(path.relative_to(to).as_posix() for path in to.rglob("*.*")) == ["a.png", "side/b.png"]
    assert (to / "a.png").read_bytes() == (root / "a.png").read_bytes()
    assert (root / "metadata.jsonl").exists()


def test_images_are_never_copied_into_a_folder_that_is_not_empty(tmp_path):
    root = dataset(tmp_path / "TOFU", ["a.png"])
    with pytest.raises(InputError, match="exists already: name a new folder"):
        copy_pictures(root, root)


def test_images_of_several_folders_have_distinct_names_and_repeats(tmp_path):
    one, two = (dataset(tmp_path / name, ["a.png"], {"a.png": name}) for name in ("one", "two"))
    samples = read_folders([(one, 1), (two, 3)])
    assert [(s.name, s.captions, s.repeats) for s in samples] == [
        ("one/a.png", ("one",), 1), ("two/a.png", ("two",), 3),
    ]  # fmt: skip
    assert [(s.name, s.repeats) for s in read_folders([(two, 3)])] == [("a.png", 3)]


def test_folders_that_hold_the_same_pictures_or_one_name_are_refused(tmp_path):
    one, two = (dataset(tmp_path / name / "x", ["a.png"], {"a.png": name}) for name in ("one", "two"))
    with pytest.raises(InputError, match=r"two folders of dataset\.root are called x"):
        read_folders([(one, 1), (two, 1)])
    with pytest.raises(InputError, match=r"x/a\.png is also x/a\.png: name every folder once"):
        read_folders([(one, 1), (one, 1)])
    (tmp_path / "one" / "metadata.jsonl").write_text('{"file_name": "x/a.png", "text": "a"}')
    with pytest.raises(InputError, match=r"one/x/a\.png is also x/a\.png"):
        read_folders([(tmp_path / "one", 1), (one, 1)])


def test_a_picture_may_have_several_captions(tmp_path):
    dataset(tmp_path, ["a.png", "b.png"], {"a.png": ["one", " two\nlines ", ""], "b.png": "three"})
    assert [sample.captions for sample in read_dataset(tmp_path)] == [("one", "two lines"), ("three",)]


def test_prefix_and_suffix_are_joined_to_an_unchanged_caption():
    assert apply_caption_affixes("a {trigger} , smiling", "", "", "X") == "a {trigger} , smiling"
    assert (
        apply_caption_affixes("a hat", "photo of {trigger},", ", {trigger} style", "X") == "photo of X, a hat, X style"
    )
    assert apply_caption_affixes("a hat", "", "by X", "X") == "a hat by X"
