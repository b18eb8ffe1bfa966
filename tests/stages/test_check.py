import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from lora_lab.demo import TOFU
from lora_lab.errors import InputError
from lora_lab.images.scan import find_pictures
from lora_lab.stages.check import check, inspect, phrases_in_all

TRIGGER = "HANA_TOFU"


def drawing(seed, size=(128, 128)):
    """Coloured blocks, unlike those of any other seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "TOFU"
    folder.mkdir()
    return folder


def write(root, captions):
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def checked(root, captions_needed=True, resolution=128, count_tokens=None):
    return inspect(root, TRIGGER, resolution, captions_needed, root.parent / "run", 64, count_tokens)


def test_the_bundled_tofu_is_ready_and_only_its_background_is_worth_a_word(tmp_path, capsys):
    result = inspect(TOFU, TRIGGER, 128, True, tmp_path, 64)
    assert result.errors == []
    assert result.findings.duplicates == [], "a wink is no copy"
    assert result.findings.buckets == {"128x128": 24}
    assert result.findings.in_every_caption == ["purple background"]
    (warning,) = result.warnings
    assert warning.startswith('"purple background" is in 24 of 24 captions: it will be learnt as part of HANA_TOFU')
    printed = capsys.readouterr().out
    assert "24 pictures, 24 captions" in printed and warning in printed and "128x128 (24)" in printed


def test_check_json_holds_the_whole_result(root):
    drawing(0).save(root / "a.png")
    write(root, {"a.png": "no trigger"})
    result = checked(root)
    written = json.loads((root.parent / "run" / "check.json").read_text(encoding="utf-8"))
    assert written["warnings"] == result.warnings and written["errors"] == []
    assert written["findings"]["without_trigger"] == ["a.png"]


def test_every_tofu_resized_or_recompressed_is_found_to_be_a_copy(root):
    forms = [("png", 96, None), ("png", 300, None), ("jpg", 128, 30), ("jpg", 512, 75)]
    for number, path in enumerate(find_pictures(TOFU).values()):
        with Image.open(path) as picture:
            suffix, side, quality = forms[number % len(forms)]
            picture.save(root / f"{path.stem}_0.png")
            copy = picture.resize((side, side), Image.Resampling.BICUBIC)
            copy.save(root / f"{path.stem}_1.{suffix}", **({"quality": quality} if quality else {}))
    duplicates = checked(root, captions_needed=False).findings.duplicates
    expected = [(f"{number:02}_1", f"{number:02}_0.png") for number in range(24)]
    assert [(copy[:4], original) for copy, original in duplicates] == expected


def test_one_drawing_in_two_colours_is_two_pictures(root):
    colour = np.asarray(drawing(0))
    Image.fromarray(colour).save(root / "a.png")
    Image.fromarray(np.roll(colour, 1, axis=2)).save(root / "b.png")
    grey = Image.fromarray(colour).convert("L")
    grey.save(root / "c.png")
    assert checked(root, captions_needed=False).findings.duplicates == []


def test_what_training_would_refuse_is_an_error_and_all_of_it_is_told_at_once(root):
    for name in ("a.png", "b.png", "lost.jpg"):
        drawing(len(name) + ord(name[0])).save(root / name)
    (root / "damaged.png").write_bytes((root / "a.png").read_bytes()[:300])
    write(root, {"a.png": TRIGGER, "lost.png": TRIGGER, "damaged.png": TRIGGER})
    result = checked(root)
    assert [line for line in result.errors if "damaged.png is cut off or damaged" in line]
    assert [line for line in result.errors if "b.png, lost.jpg" in line and "no caption" in line]
    assert [line for line in result.errors if "caption for lost.png" in line and "was lost.jpg meant?" in line]
    assert len(result.errors) == 3
    assert list(result.findings.unreadable) == ["damaged.png"]


def test_captions_may_wait_until_they_are_needed(root):
    drawing(0).save(root / "a.png")
    assert (checked(root, captions_needed=False).errors, checked(root, captions_needed=False).warnings) == ([], [])
    (error,) = checked(root).errors
    assert "run stage=caption first" in error
    drawing(1).save(root / "b.png")
    write(root, {"a.png": TRIGGER})
    partly = checked(root, captions_needed=False)
    assert partly.errors == [] and "1 pictures have no caption yet (b.png)" in partly.warnings[0]


def test_captions_that_cannot_be_read_are_one_error_and_not_one_for_each_picture(root):
    drawing(0).save(root / "a.png")
    (root / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "A HANA_TOFU"\n')
    (error,) = checked(root).errors
    assert "metadata.jsonl" in error


def test_names_equal_in_unicode_are_an_error_and_names_equal_but_for_case_a_warning(root):
    twice = [unicodedata.normalize(form, "두부.png") for form in ("NFC", "NFD")]
    for number, name in enumerate(["Cat.png", "cat.png", *twice]):
        drawing(number).save(root / name)
    result = checked(root, captions_needed=False)
    assert len(result.errors) == 1 and "두부.png" in result.errors[0] and "twice" in result.errors[0]
    assert [line for line in result.warnings if "Cat.png and cat.png" in line]


def test_pictures_that_would_be_enlarged_are_told_by_how_much(root):
    drawing(0, (64, 64)).save(root / "small.png")
    drawing(1, (128, 128)).save(root / "right.png")
    drawing(2, (400, 300)).save(root / "large.png")
    result = checked(root, captions_needed=False)
    assert result.findings.enlarged == {"small.png": 2.0}
    assert "1 pictures would be enlarged, small.png 2.0 times" in result.warnings[0]


def test_the_shapes_training_will_batch_are_counted(root):
    for number, size in enumerate([(512, 512), (600, 600), (512, 1000), (2000, 1000)]):
        drawing(number, size).save(root / f"{number}.png")
    buckets = checked(root, captions_needed=False, resolution=512).findings.buckets
    assert buckets == {"512x512": 2, "384x640": 1, "640x384": 1}


def test_the_trigger_counts_as_a_whole_word_in_its_own_letters(root):
    captions = {
        "0.png": "A HANA_TOFU, smiling",
        "1.png": "HANA_TOFU's hat",
        "2.png": "a hana_tofu",
        "3.png": "HANA_TOFU2 smiling",
        "4.png": "smiling",
    }
    for number, name in enumerate(captions):
        drawing(number).save(root / name)
    write(root, captions)
    result = checked(root)
    assert result.findings.without_trigger == ["2.png", "3.png", "4.png"]
    assert [line for line in result.warnings if line.startswith("3 captions do not say HANA_TOFU (2.png, 3.png,")]


def test_a_caption_longer_than_clip_reads_is_named_with_its_length(root):
    captions = {"0.png": TRIGGER + " x" * 76, "1.png": TRIGGER + " x" * 77}
    for number, name in enumerate(captions):
        drawing(number).save(root / name)
    write(root, captions)
    result = checked(root, count_tokens=lambda caption: len(caption.split()))
    assert result.findings.too_long == {"1.png": 78}
    assert [line for line in result.warnings if "caption of 1.png is 78 tokens" in line]


def test_formats_that_are_not_read_are_to_be_converted(root):
    drawing(0).save(root / "a.png")
    (root / "phone.HEIC").write_bytes(b"")
    result = checked(root, captions_needed=False)
    assert result.errors == [] and "phone.HEIC): convert them to PNG" in result.warnings[0]


def test_only_a_folder_without_pictures_stops_the_check(root):
    with pytest.raises(InputError, match="no pictures in"):
        checked(root)


@pytest.mark.parametrize(
    ("captions", "phrases"),
    [
        (["A T with a red hat, smiling", "T with a red hat", "T in a red hat, a red hat"], ["red hat"]),
        (["T, on grass, smiling", "smiling T on grass", "on grass T smiling"], ["grass", "smiling"]),
        (["T with a hat", "T with a scarf", "T with a bag"], []),
        (["a hat T", "hat", "hats"], []),
        (["red, hat T", "red, hat T", "red, hat T"], ["red", "hat"]),
        (["T smiling", "T smiling"], []),
        (["빨간 모자를 쓴 T", "T, 빨간 모자를 쓴", "빨간 모자를 쓴 T, 웃음"], ["빨간 모자를 쓴"]),
    ],
)
def test_words_in_every_caption_are_found_as_phrases(captions, phrases):
    assert phrases_in_all(captions, "T") == phrases


def test_every_caption_of_a_picture_is_checked_as_training_dresses_it(root, composed):
    for i in range(2):
        drawing(i).save(root / f"{i}.png")
    write(root, {"0.png": ["HANA_TOFU", "a block"], "1.png": "a HANA_TOFU " + "x " * 66})
    asked = ("stage=check", f"dataset.root={root}")
    found = check(composed(*asked), root.parent / "run").findings
    assert (found.captions, found.without_trigger, found.too_long) == (3, ["0.png"], {})
    dressed = ("dataset.caption_prefix='{trigger},'", "dataset.caption_suffix='by somebody with a long, long name'")
    found = check(composed(*asked, *dressed), root.parent / "run").findings
    assert found.without_trigger == [] and found.too_long["1.png"] > 77
