"""stage=check reports what stage=train would refuse, and what would make a worse LoRA."""

import json
import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image
from unloadable import unloadable_models

from lora_lab.captions.files import read_captions
from lora_lab.demo import TOFU
from lora_lab.errors import InputError
from lora_lab.images import duplicates
from lora_lab.images.dataset import read_folders
from lora_lab.images.inspection import inspect_dataset
from lora_lab.images.pixels import aspect_buckets
from lora_lab.images.scan import find_pictures
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.settings.schema import Triggers
from lora_lab.training.resolve import resolve_training
from lora_lab.training.run import describe

TRIGGER = "HANA_TOFU"
ONE = Triggers({"": TRIGGER})


def drawing(seed, size=(128, 128)):
    """Coloured blocks, unlike those of any other seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def unloadable(tmp_path):
    return unloadable_models(tmp_path / "models")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "TOFU"
    folder.mkdir()
    return folder


def write(root, captions):
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items()]
    (root / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def check(root, *overrides):
    """The result of stage=check. Raises InputError for a folder that it refuses."""
    return run_stage(compose("stage=check", "dataset=folder", f"dataset.root={root}", *overrides), root.parent / "run")


def checked(root, *overrides):
    """The report of stage=check on a folder that it may refuse."""
    (root.parent / "run" / "check.json").unlink(missing_ok=True)
    try:
        check(root, *overrides)
    except InputError as error:
        refused = str(error)
    else:
        refused = None
    result = json.loads((root.parent / "run" / "check.json").read_text(encoding="utf-8"))
    assert refused is None if not result["errors"] else refused.startswith(result["errors"][0])
    return result


def test_the_bundled_tofu_is_ready_and_only_its_background_is_a_warning(tmp_path, capsys):
    result = run_stage(compose("stage=check"), tmp_path / "run")
    assert result.errors == [] and result.ready
    assert result.findings.duplicates == [], "a wink is not a copy"
    assert result.findings.buckets == {"128x128": 24}
    assert result.findings.common_words[TRIGGER].shared == {"purple background": 24}
    (warning,) = result.warnings
    assert warning.startswith('"purple background" is in 24 of 24 captions: it will be learnt as part of HANA_TOFU')
    printed = capsys.readouterr().out
    assert "24 pictures, 24 captions" in printed and warning in printed and "128x128 (24)" in printed
    assert printed.endswith("ready for stage=train\n")


def test_check_json_holds_the_whole_result(root):
    for number in range(2):
        drawing(number).save(root / f"{number}.png")
    write(root, {"0.png": "no trigger", "1.png": TRIGGER})
    result = check(root)
    written = json.loads((root.parent / "run" / "check.json").read_text(encoding="utf-8"))
    assert written["warnings"] == result.warnings and written["errors"] == []
    assert written["findings"]["without_trigger"] == ["0.png"]


def test_every_tofu_resized_or_recompressed_is_found_to_be_a_copy(root):
    forms = [("png", 96, None), ("png", 300, None), ("jpg", 128, 30), ("jpg", 512, 75)]
    for number, path in enumerate(find_pictures(TOFU).values()):
        with Image.open(path) as picture:
            suffix, side, quality = forms[number % len(forms)]
            picture.save(root / f"{path.stem}_0.png")
            copy = picture.resize((side, side), Image.Resampling.BICUBIC)
            copy.save(root / f"{path.stem}_1.{suffix}", **({"quality": quality} if quality else {}))
    duplicates = check(root).findings.duplicates
    expected = [(f"{number:02}_1", f"{number:02}_0.png") for number in range(24)]
    assert [(copy[:4], original) for copy, original in duplicates] == expected


def test_one_drawing_in_two_colours_is_two_pictures(root):
    colour = np.asarray(drawing(0))
    Image.fromarray(colour).save(root / "a.png")
    Image.fromarray(np.roll(colour, 1, axis=2)).save(root / "b.png")
    grey = Image.fromarray(colour).convert("L")
    grey.save(root / "c.png")
    assert check(root).findings.duplicates == []


def test_every_fault_that_training_would_refuse_is_reported_at_once(root):
    for name in ("a.png", "b.png", "lost.jpg"):
        drawing(len(name) + ord(name[0])).save(root / name)
    (root / "damaged.png").write_bytes((root / "a.png").read_bytes()[:300])
    write(root, {"a.png": TRIGGER, "lost.png": TRIGGER, "damaged.png": TRIGGER})
    result = checked(root)
    assert [line for line in result["errors"] if "damaged.png is cut off or damaged" in line]
    assert [line for line in result["errors"] if "caption for lost.png" in line and "was lost.jpg meant?" in line]
    assert len(result["errors"]) == 2
    assert [line for line in result["warnings"] if "b.png, lost.jpg" in line and "no caption" in line]
    assert list(result["findings"]["unreadable"]) == ["damaged.png"]


def test_a_folder_without_captions_is_not_ready_for_training_and_the_report_says_so(root, capsys):
    drawing(0).save(root / "a.png")
    result = check(root)
    assert result.errors == [] and not result.ready
    (warning,) = result.warnings
    assert warning == f"stage=train refuses this folder as it is: no captions in {root}: run stage=caption first"
    printed = capsys.readouterr().out
    assert warning in printed and printed.endswith("not ready for stage=train yet\n")


def test_images_without_a_caption_beside_others_with_one_are_named(root):
    for number, name in enumerate(("a.png", "b.png")):
        drawing(number).save(root / name)
    write(root, {"a.png": TRIGGER})
    result = check(root)
    assert result.errors == [] and not result.ready
    assert "1 of the 2 pictures in" in result.warnings[0] and "no caption (b.png)" in result.warnings[0]


def test_captions_of_which_none_has_the_trigger_are_not_ready_for_training(root):
    drawing(0).save(root / "a.png")
    write(root, {"a.png": "a tofu"})
    result = check(root)
    assert result.errors == [] and not result.ready
    assert "has the trigger HANA_TOFU: run stage=refine" in result.warnings[0]
    assert check(root, "dataset.caption_prefix='{trigger},'").ready


def lose_the_captions(folder):
    (folder / "metadata.jsonl").unlink()


def lose_a_caption(folder):
    write(folder, {name: text for name, text in read_captions(folder).items() if name != "01.png"})


def lose_the_trigger(folder):
    write(folder, {name: text.replace(TRIGGER, "tofu") for name, text in read_captions(folder).items()})


def lose_an_image(folder):
    (folder / "01.png").unlink()


def lose_an_image_and_the_caption_of_another(folder):
    lose_an_image(folder)
    write(folder, {name: text for name, text in read_captions(folder).items() if name != "02.png"})


def damage_an_image(folder):
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:300])


def contradict_the_captions(folder):
    (folder / "metadata.csv").write_text("file_name,text\n00.png,HANA_TOFU\n", encoding="utf-8")


def repeat_a_name(folder):
    (folder / "01.png").unlink()
    for form in ("NFC", "NFD"):
        shutil.copy(folder / "00.png", folder / unicodedata.normalize(form, "두부.png"))
    write(folder, {"00.png": TRIGGER, "02.png": TRIGGER, "두부.png": TRIGGER})


@pytest.mark.parametrize(
    "spoil",
    [lose_the_captions, lose_a_caption, lose_the_trigger, lose_an_image, lose_an_image_and_the_caption_of_another,
     damage_an_image, contradict_the_captions, repeat_a_name],
)  # fmt: skip
def test_what_training_refuses_is_in_the_report(root, spoil):
    for name in ("00.png", "01.png", "02.png"):
        shutil.copy(TOFU / name, root)
    write(root, {name: read_captions(TOFU)[name] for name in ("00.png", "01.png", "02.png")})
    assert check(root).ready
    spoil(root)
    training = compose("stage=train", "dataset=folder", f"dataset.root={root}", "tracker=off", "device=cpu")
    with pytest.raises(InputError) as refused:
        run_stage(training, root.parent / "training")
    result = checked(root)
    assert not result["ready"]
    assert [line for line in result["errors"] + result["warnings"] if line.endswith(str(refused.value))]


def test_captions_that_cannot_be_read_are_one_error_and_not_one_for_each_picture(root):
    drawing(0).save(root / "a.png")
    (root / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "A HANA_TOFU"\n')
    (error,) = checked(root)["errors"]
    assert "metadata.jsonl" in error


def test_names_equal_in_unicode_are_an_error_and_names_equal_but_for_case_a_warning(root):
    twice = [unicodedata.normalize(form, "두부.png") for form in ("NFC", "NFD")]
    for number, name in enumerate(["Cat.png", "cat.png", *twice]):
        drawing(number).save(root / name)
    result = checked(root)
    assert len(result["errors"]) == 1 and "두부.png" in result["errors"][0] and "twice" in result["errors"][0]
    assert [line for line in result["warnings"] if "Cat.png and cat.png" in line]


def test_images_that_would_be_enlarged_are_reported_with_their_scale(root):
    drawing(0, (64, 64)).save(root / "small.png")
    drawing(1, (128, 128)).save(root / "right.png")
    drawing(2, (400, 300)).save(root / "large.png")
    result = check(root)
    assert result.findings.enlarged == {"small.png": 2.0}
    assert "1 pictures would be enlarged, small.png 2.0 times" in result.warnings[1]


def test_the_buckets_of_training_are_counted(root):
    for number, size in enumerate([(512, 512), (600, 600), (512, 1000), (2000, 1000)]):
        drawing(number, size).save(root / f"{number}.png")
    buckets = check(root, "model.resolution=512", "model.bucket_step=64").findings.buckets
    assert buckets == {"512x512": 2, "384x640": 1, "640x384": 1}


def test_the_trigger_counts_as_a_whole_word_in_its_own_case(root):
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
    result = check(root)
    assert result.findings.without_trigger == ["2.png", "3.png", "4.png"]
    assert [line for line in result.warnings if line.startswith("3 captions do not have HANA_TOFU (2.png, 3.png,")]


def test_a_caption_longer_than_the_window_of_clip_is_reported_with_its_length(root):
    captions = {"0.png": TRIGGER + " x" * 76, "1.png": TRIGGER + " x" * 77}
    for number, name in enumerate(captions):
        drawing(number).save(root / name)
    write(root, captions)
    findings = inspect_dataset([root], ONE, aspect_buckets(128, 64), count_tokens=lambda text: len(text.split()))
    assert findings.too_long == {"1.png": 78}
    result = check(root)
    tokens = result.findings.too_long["1.png"]
    assert [line for line in result.warnings if f"caption of 1.png is {tokens} tokens" in line]


def test_formats_that_are_not_read_are_reported(root):
    drawing(0).save(root / "a.png")
    (root / "drawing.PSD").write_bytes(b"")
    result = check(root)
    assert result.errors == [] and result.findings.unused["drawing.PSD"].endswith("convert it to PNG")
    assert [line for line in result.warnings if line.startswith("not used: drawing.PSD (an image in a format")]


def test_only_a_folder_without_pictures_stops_the_check(root):
    with pytest.raises(InputError, match="no pictures in"):
        check(root)


def test_several_folders_are_checked_as_training_reads_them(root):
    other = root.parent / "other"
    for number, folder in enumerate((root, other)):
        folder.mkdir(exist_ok=True)
        drawing(number).save(folder / "a.png")
        write(folder, {"a.png": f"{TRIGGER}, smiling"})
    result = check(root, f"dataset.root=[{root},{{root: {other}, repeats: 2}}]")
    assert result.ready and result.findings.captions == 2
    drawing(0).save(other / "b.png")
    result = check(root, f"dataset.root=[{root},{other}]")
    assert not result.ready and result.findings.uncaptioned == ["other/b.png"]
    assert result.findings.duplicates == [("other/b.png", "TOFU/a.png")]


def test_folders_that_training_cannot_tell_apart_are_refused(root):
    other = root.parent / "other" / "TOFU"
    other.mkdir(parents=True)
    for number, folder in enumerate((root, other)):
        drawing(number).save(folder / "a.png")
        write(folder, {"a.png": f"{TRIGGER}, smiling"})
    with pytest.raises(InputError, match=r"two folders of dataset\.root are called TOFU"):
        check(root, f"dataset.root=[{root},{other}]")
    with pytest.raises(InputError, match=r"TOFU/a\.png is also TOFU/a\.png: name every folder once"):
        check(root, f"dataset.root=[{root},{root}]")


def test_what_should_be_left_to_the_trigger_is_told_with_how_to_take_it_out(root):
    captions = ["red body, big eye, smiling", "red body, 웃음", "red body", "big eye", "red body, big eye, smiling"]
    for number in range(len(captions)):
        drawing(number).save(root / f"{number}.png")
    write(root, {f"{number}.png": f"{TRIGGER}, {text}" for number, text in enumerate(captions)})
    result = check(root)
    assert result.ready and result.findings.foreign == {"1.png": "Korean"}
    assert result.findings.repeated == [["0.png", "4.png"]]
    for words in (
        '"red body" is in 4 of 5',
        "refiner.strip=auto",
        '"big eye" is in all 3',
        "strip=[big eye]",
        "Korean",
    ):
        assert [line for line in result.warnings if words in line], words


def test_every_caption_of_an_image_is_checked_with_the_prefix_and_suffix_of_training(root):
    for i in range(2):
        drawing(i).save(root / f"{i}.png")
    write(root, {"0.png": ["HANA_TOFU", "a block"], "1.png": "a HANA_TOFU " + "x " * 66})
    findings = check(root).findings
    assert (findings.captions, findings.without_trigger, findings.too_long) == (3, ["0.png"], {})
    affixes = ("dataset.caption_prefix='{trigger},'", "dataset.caption_suffix='by somebody with a long, long name'")
    findings = check(root, *affixes).findings
    assert findings.without_trigger == [] and findings.too_long["1.png"] > 77


def test_everything_in_the_folder_that_is_not_used_is_named_with_its_reason(root, capsys):
    for number, name in enumerate(("a.png", "b.png")):
        drawing(number).save(root / name)
    write(root, {"a.png": TRIGGER, "b.png": f"{TRIGGER} smiling"})
    outside = root.parent / "outside"
    outside.mkdir()
    drawing(9).save(outside / "c.png")
    for folder in ("@eaDir", ".git", "more/#recycle"):
        (root / folder).mkdir(parents=True)
        drawing(5).save(root / folder / "a.png")
    for name in ("a.png~", "clip.mp4", "raw.CR2", ".DS_Store", "Thumbs.db", "metadata.1.jsonl.bak", "hints.csv"):
        (root / name).write_bytes(b"")
    (root / "links").symlink_to(outside)
    os.mkfifo(root / "pipe.jpg")
    result = check(root)
    assert result.ready and result.findings.pictures == 2
    assert list(result.findings.unused) == [
        ".git/", "@eaDir/", "a.png~", "clip.mp4", "links/", "more/#recycle/", "pipe.jpg", "raw.CR2",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    for words in ("links/ (a link that leads out", "not used: a.png~, clip.mp4 (neither", "pipe.jpg (a FIFO"):
        assert words in printed
    config = compose("stage=train", "dataset=folder", f"dataset.root={root}", "tracker=off", "device=cpu")
    plan = describe(resolve_training(config, root.parent / "training"))
    (line,) = [line for line in plan.splitlines() if " unused " in line]
    assert "8 in" in line and ".git/, @eaDir/, a.png~ and 5 more (stage=check says why)" in line
    write(root, {"a.png": TRIGGER, "b.png": TRIGGER, "links/c.png": TRIGGER})
    assert "links/c.png, which is a link that leads out of the folder: copy" in checked(root)["errors"][0]
    assert check(root, "dataset.follow_links=true").findings.pictures == 3


def test_moving_blank_and_long_images_are_named_with_the_figure_by_check_and_by_train(root):
    frames = [Image.new("RGB", (128, 128), "black"), drawing(1), drawing(2)]
    for name, form in (("move.webp", "WEBP"), ("apng.png", "PNG"), ("anim.gif", "GIF"), ("gif_inside.png", "GIF")):
        frames[0].save(root / name, form, save_all=True, append_images=frames[1:], duration=100)
    drawing(3, (1280, 128)).save(root / "panorama.png")
    drawing(4, (128, 128)).save(root / "square.png")
    write(root, {path.name: TRIGGER for path in root.iterdir()})
    result = check(root)
    moving = ["anim.gif", "apng.png", "gif_inside.png", "move.webp"]
    assert result.findings.frames == dict.fromkeys(moving, 3) and result.findings.blank == moving
    assert [line for line in result.warnings if line.startswith("move.webp has 3 frames or pages, of which the first")]
    assert [line for line in result.warnings if line.startswith("move.webp is black or transparent all over")]
    (share,) = result.findings.cut_away.values()
    assert share > 0.8 and [
        line for line in result.warnings if "panorama.png is" in line and f"{share:.0%} of it" in line
    ]
    config = compose("stage=train", "dataset=folder", f"dataset.root={root}", "tracker=off", "device=cpu")
    plan = describe(resolve_training(config, root.parent / "training"))
    assert "    frames  of anim.gif (3), apng.png (3), gif_inside.png (3) and 1 more the first is used" in plan
    assert f"       cut  away by the buckets: {share:.0%} of panorama.png (stage=check says more)" in plan


def test_repeats_in_the_names_of_kohyas_folders_are_told_and_read_on_demand(root):
    for number, folder in enumerate(("10_tofu woman", "1_others", "2024_05", "plain")):
        (root / folder).mkdir()
        drawing(number).save(root / folder / "a.png")
        (root / folder / "a.txt").write_text(f"{TRIGGER} {number}")
    result = check(root)
    assert result.findings.folder_repeats == {"10_tofu woman/a.png": 10}
    (line,) = [line for line in result.warnings if "kohya" in line]
    assert "10_tofu woman (10 times)" in line and "dataset.kohya_folders=true" in line
    assert not [line for line in check(root, "dataset.kohya_folders=true").warnings if "kohya" in line]
    samples = read_folders([(root, 2)], kohya_folders=True)
    assert {s.name: s.repeats for s in samples} == {
        "1_others/a.png": 2, "10_tofu woman/a.png": 20, "2024_05/a.png": 2, "plain/a.png": 2,
    }  # fmt: skip


def test_a_caption_of_a_book_and_a_name_with_escapes_are_printed_short_and_safe(root, capsys):
    text = f"{TRIGGER} " + " ".join(f"word{i}" for i in range(20_000))
    for number in range(3):
        drawing(number).save(root / f"{number}.png")
    (root / "evil\x1b[2J\nready for stage=train").write_bytes(b"")
    write(root, {f"{number}.png": text for number in range(3)})
    result = check(root)
    (phrase,) = result.findings.common_words[TRIGGER].shared
    assert len(phrase) < 1000 and len(result.findings.unused) == 1
    printed = capsys.readouterr().out
    assert len(printed) < 5000 and "\x1b" not in printed and "\\x1b[2J\\x0aready" in printed


def test_two_thousand_thumbnails_are_compared_without_comparing_all_with_all(monkeypatch):
    compared = []
    plain = duplicates._are_copies
    monkeypatch.setattr(duplicates, "_are_copies", lambda one, two: compared.append(1) or plain(one, two))
    random = np.random.default_rng(0)
    for count in (500, 2000):
        compared.clear()
        features = {
            str(i): duplicates.Thumbnail(
                random.random((16, 16)) > 0.5, random.uniform(0, 255, 3) * np.ones((16, 16, 3))
            )
            for i in range(count)
        }
        features |= {f"copy of {i}": features[str(i)] for i in range(0, count, 10)}
        assert duplicates.find_duplicates(features) == [(f"copy of {i}", str(i)) for i in range(0, count, 10)]
        assert len(compared) < 2 * count


@pytest.mark.parametrize("stage", ["caption", "pipeline", "img2img"])
def test_other_stages_say_in_one_line_what_they_do_not_use(root, capsys, stage, unloadable):
    drawing(0).save(root / "a.png")
    for name in ("drawing.psd", "notes.pdf", "clip.mp4", "b.png~"):
        (root / name).write_bytes(b"")
    settings = ["dataset=folder", f"dataset.root={root}"]
    if stage == "img2img":
        settings = [f"stage.photo={root}", "stage.lora_weight=0"]
    with pytest.raises(InputError, match=r"(model|captioner)\.base="):
        run_stage(compose(f"stage={stage}", *settings, *unloadable), root.parent / "run")
    line = f"4 in {root} not used: b.png~, clip.mp4, drawing.psd and 1 more (stage=check says why)"
    assert line in capsys.readouterr().out.splitlines()


def test_the_deleted_captions_of_a_bin_are_not_read(root):
    drawing(0).save(root / "a.png")
    (root / "#recycle").mkdir()
    write(root / "#recycle", {"a.png": TRIGGER})
    assert read_captions(root) == {}
