"""caption, refine and convert on a copy of the demo's pictures: a person's words survive everything."""

import json
import shutil
from pathlib import Path

import pytest
from unloadable import unloadable_models

from lora_lab.captions.files import read_captions, write_captions
from lora_lab.demo import TOFU
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "tofu"
    folder.mkdir()
    for name in ("00.png", "03.png", "06.png"):
        shutil.copy(TOFU / name, folder)
    return folder


def do(root: Path, *overrides: str):
    config = compose("dataset=folder", f"dataset.root={root}", "refiner=avatars", "device=cpu", *overrides)
    return run_stage(config, root.parent / "run")


def test_missing_captions_are_written_and_those_of_a_person_are_kept(root):
    write_captions(root, {"03.png": "my own words"})
    result = do(root, "stage=caption")
    captions = read_captions(root)
    assert captions["03.png"] == "my own words"
    assert "purple background" in captions["00.png"] and "top hat" in captions["06.png"]
    assert set(result.captions) == {"00.png", "06.png"} and result.kept == 1
    assert do(root, "stage=caption").captions == {}


def test_replace_rewrites_only_captions_of_a_captioner(root):
    do(root, "stage=caption")
    captions = read_captions(root)
    write_captions(root, captions | {"03.png": captions["03.png"] + ", my favourite"})
    result = do(root, "stage=caption", "stage.mode=replace")
    assert set(result.captions) == {"00.png", "06.png"}
    assert read_captions(root)["03.png"].endswith("my favourite")


def test_replace_rewrites_refined_captions_of_a_captioner_too(root):
    write_captions(root, {"03.png": "a person's tofu"})
    do(root, "stage=caption")
    do(root, "stage=refine")
    by_hand = read_captions(root)["03.png"]
    assert set(do(root, "stage=caption", "stage.mode=replace").captions) == {"00.png", "06.png"}
    assert read_captions(root)["03.png"] == by_hand


def test_propose_writes_another_file_and_changes_nothing(root):
    write_captions(root, {"00.png": "mine", "03.png": "mine too", "06.png": "and mine"})
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    do(root, "stage=caption", "stage.mode=propose")
    after = {path.name: path.read_bytes() for path in root.iterdir()}
    proposed = after.pop("metadata.proposed.jsonl").decode().splitlines()
    assert after == before
    assert [json.loads(line)["file_name"] for line in proposed] == ["00.png", "03.png", "06.png"]


@pytest.mark.slow
def test_captioners_are_compared_on_one_page_and_their_captions_can_be_taken_over(root, type_in):
    write_captions(root, {"03.png": "my own words"})
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    command = ("-m", "stage=caption", "captioner=blip_tiny", "captioner.min_confidence=0,0.45", "device=cpu")
    code, out, err = type_in(*command, "dataset=folder", f"dataset.root={root}", "hydra.sweep.dir=sweep")
    assert code == 0 and "several jobs caption" in err and "compare the runs: sweep/index.html" in out
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before
    page = Path("sweep/index.html").read_text()
    assert page.count("<img") == 3 and "captioner.min_confidence 0.45" in page and "images a second" in page
    proposed = [json.loads(Path(f"sweep/{job}/result.json").read_text())["captions"] for job in (0, 1)]
    assert all([*captions] == ["00.png", "03.png", "06.png"] for captions in proposed)
    source = "stage.source=sweep/1/metadata.proposed.jsonl"
    assert type_in("stage=convert", "dataset=folder", f"dataset.root={root}", source)[0] == 0
    assert read_captions(root) == proposed[1] and (root / "metadata.1.jsonl.bak").is_file()


def test_the_bundled_pictures_are_never_written_to(tmp_path):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in TOFU.iterdir())
    with pytest.raises(InputError, match="bundled files are not written to"):
        run_stage(compose("stage=caption", "stage.mode=propose"), tmp_path)
    with pytest.raises(InputError, match="bundled files are not written to"):
        run_stage(compose("stage=convert", "stage.form=csv"), tmp_path)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in TOFU.iterdir()) == before


def test_refining_puts_the_trigger_in_keeps_the_raw_captions_and_is_stable(root, capsys):
    do(root, "stage=caption")
    raw = read_captions(root)
    do(root, "stage=refine")
    refined = read_captions(root)
    assert all(text.count("HANA_TOFU") == 1 for text in refined.values())
    assert "round glasses" in refined["03.png"]
    printed = capsys.readouterr().out
    assert "before" in printed and "after" in printed
    history = [json.loads(line) for line in (root / "captions.history.jsonl").read_text().splitlines()]
    assert {row["file_name"]: row["was"] for row in history if row["by"] == "refine"} == raw
    files = {path.name: path.read_bytes() for path in root.iterdir()}
    assert do(root, "stage=refine").after == {}
    assert {path.name: path.read_bytes() for path in root.iterdir()} == files


def test_hints_are_appended_to_their_captions(root):
    write_captions(root, dict.fromkeys(("00.png", "03.png", "06.png"), "a cartoon white ghost, smiling"))
    (root / "hints.csv").write_text("file_name,text\n03.png,holding a flower\n", encoding="utf-8")
    do(root, "stage=refine")
    assert read_captions(root)["03.png"] == "A HANA_TOFU, smiling, holding a flower"
    assert read_captions(root)["00.png"] == "A HANA_TOFU, smiling"
    (root / "hints.csv").write_text("file_name,text\n30.png,holding a flower\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"30\.png"):
        do(root, "stage=refine")


def test_captions_survive_every_form(root):
    captions = {"00.png": 'a "tofu", waving', "03.png": "김치 두부 😀", "06.png": "=1+1, it's;a test"}
    write_captions(root, captions, "csv")
    source = root / "metadata.csv"
    for form, file in (
        ("jsonl", "metadata.jsonl"),
        ("json", "metadata.json"),
        ("txt", ""),
        ("jsonl", "metadata.jsonl"),
    ):
        output = root.parent / f"as-{form}-{source.name}"
        output.mkdir()
        for name in captions:
            shutil.copy(root / name, output)
        do(root, "stage=convert", f"stage.source={source}", f"stage.form={form}", f"stage.output={output}")
        source = output / file if file else output
        assert read_captions(output) == captions


def test_converting_in_place_keeps_the_other_form_and_agrees_with_it(root):
    captions = {"00.png": "one", "03.png": "two", "06.png": "three"}
    write_captions(root, captions, "csv")
    do(root, "stage=convert", "stage.form=txt")
    assert (root / "00.txt").read_text() == "one\n" or (root / "00.txt").read_text() == "one"
    assert (root / "metadata.csv").is_file() and read_captions(root) == captions


@pytest.mark.slow
def test_imagefolder_of_hugging_face_reads_the_written_captions(root):
    (root / "00.png").rename(root / "image_10.png")
    (root / "03.png").rename(root / "image_2.png")
    do(root, "stage=caption")
    do(root, "stage=caption", "stage.mode=propose")
    do(root, "stage=refine")
    import datasets

    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(root), split="train", cache_dir=str(root.parent / "cache")
    )
    names = [Path(row["image"].filename).name for row in loaded]
    assert names == ["06.png", "image_2.png", "image_10.png"]
    assert dict(zip(names, loaded["text"], strict=True)) == read_captions(root)


def test_what_prompts_and_captions_do_not_do_is_said_before_a_model_is_loaded(root, tmp_path, capsys):
    write_captions(root, {"00.png": "HANA_TOFU (red:1.3)", "03.png": "HANA_TOFU", "06.png": "HANA_TOFU"})
    prompts = "stage.prompts=['A {trigger} --w 256 --n bad', 'a cat', '<lora:x:1> {trigger}']"
    models = unloadable_models(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded"):
        do(root, "stage=train", "steps=1", prompts, *models, "prior.prompt='a [trigger]'", "prior=generated")
    photo = ("stage.photo=demo:photos", "stage.prompt='a cat (big:1.2)'", "stage.lora_weight=0")
    with pytest.raises(InputError, match="cannot be loaded"):
        do(root, "stage=img2img", *photo, *models)
    printed = capsys.readouterr().out
    for line in (
        "00.png: '(red:1.3)' is only words here",
        "stage.prompts[0]: '--w 256' is an option of other programs",
        "stage.prompts[2]: '<lora:x:1>' is only words here",
        "stage.prompts[1]: without the trigger",
        "prior.prompt: '[trigger]' is not replaced",
        "stage.prompt: '(big:1.2)' is only words here",
    ):
        assert printed.count(line) == 1


def test_auto_strips_what_the_captions_share_but_no_hint_and_no_background(root, capsys):
    planted = "A HANA_TOFU with a purple background, a square body and pink cheeks, {}"
    write_captions(root, {name: planted.format(name[0] + name[1]) for name in ("00.png", "03.png", "06.png")})
    (root / "hints.csv").write_text("file_name,text\n" + "".join(f"{n},in the snow\n" for n in read_captions(root)))
    result = do(root, "stage=refine", "refiner=off", "refiner.strip=auto")
    assert read_captions(root)["03.png"] == "A HANA_TOFU with a purple background, 03, in the snow"
    assert result.stripped == {"square body and pink cheeks": 3} and set(result.after) == {"00.png", "03.png", "06.png"}
    assert 'taken out of 3 captions by refiner.strip: "square body and pink cheeks" of 3' in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in root.iterdir()}
    again = do(root, "stage=refine", "refiner=off", "refiner.strip=auto")
    assert again.after == {} and again.stripped == {}
    assert {path.name: path.read_bytes() for path in root.iterdir()} == files
    assert len(list(root.glob("*.bak"))) == 1, "what the stage itself wrote needs no backup"
