"""Nothing of the user's is lost while captions are written: kills, edits in the meantime, and links of strangers."""

import json
import os
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from PIL import Image
from toy_captioner import Hook, ToyCaptioner

from lora_lab.captions.files import read_captions, write_captions
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage

NUMBER = 11
NAMES = [f"{i}.png" for i in range(NUMBER)]


@pytest.fixture
def root(tmp_path):
    return lay_out(tmp_path / "data")


def lay_out(root: Path) -> Path:
    root.mkdir(parents=True)
    for i in range(NUMBER):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"{i}.png")
    return root


@cache
def settings(stage: str, *overrides: str):
    return compose("dataset=folder", "device=cpu", f"stage={stage}", "dataset.root=.", *overrides)


def do(root: Path, stage: str, hook: Hook, *overrides: str, least: float = 0):
    config = settings(stage, *overrides)
    captioner = {"_target_": "toy_captioner.ToyCaptioner", "name": "toy", "hook": hook, "min_confidence": least}
    refiner = {"_target_": "toy_captioner.ToyRefiner", "hook": hook}
    dataset = replace(config.dataset, root=str(root))
    return run_stage(replace(config, dataset=dataset, captioner=captioner, refiner=refiner), root.parent / "run")


def killed(root: Path, stage: str, at: int, least: float) -> Hook:
    """Leave `root` as a kill before caption number `at` would, whatever the stage does when it is interrupted."""
    snapshot = root.with_name("snapshot")

    def kill() -> None:
        shutil.copytree(root, snapshot)
        raise KeyboardInterrupt

    hook = Hook(at, kill)
    with pytest.raises(KeyboardInterrupt):
        do(root, stage, hook, least=least)
    shutil.rmtree(root)
    snapshot.rename(root)
    return hook


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.suffix not in (".png", ".bak")}


@pytest.mark.parametrize("form", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize(("stage", "least"), [("caption", 0), ("caption", 0.5), ("refine", 0)])
def test_an_interrupted_stage_equals_an_uninterrupted_one(tmp_path, stage, least, form):
    uninterrupted = None
    for at in (-1, 0, 1, NUMBER - 2):
        root = lay_out(tmp_path / str(at) / "data")
        mine = {"3.png": "my own words"} if stage == "caption" else {f"{i}.png": f"a cat {i}" for i in range(NUMBER)}
        write_captions(root, mine, form)
        hook = Hook()
        if at >= 0:
            hook = killed(root, stage, at, least)
            done = sum(text not in mine.values() for text in read_captions(root).values())
            assert done == (hook.count if stage == "caption" else hook.count // 8 * 8), "written as they come"
        do(root, stage, hook, least=least)
        uninterrupted = uninterrupted or files(root)
        assert files(root) == uninterrupted
        assert stage == "refine" or not list(root.glob("*.bak")), "adding captions loses nothing"
        if stage == "caption":
            assert len(hook.seen) == NUMBER - 1, "the second start captions only the missing"
            assert read_captions(root)["3.png"] == "my own words"


def test_proposals_go_on_where_a_kill_ended_them(root, capsys):
    hook = Hook(7, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        do(root, "caption", hook, "stage.mode=propose", least=0.5)
    assert hook.count == 7
    shutil.copy(root / "9.png", root / "1.png")  # another image, so its proposal is of no use
    with (root / "metadata.proposed.jsonl").open("a") as file:
        file.write('{"file_name": "8.png", "text": "a toy of no hash"}\n{"file_na')
    result = do(root, "caption", hook, "stage.mode=propose", least=0.5)
    assert sorted(colour[0] for colour in hook.seen[7:]) == [7, 8, 9, 9, 10], "the five that are missing"
    assert "6 captions by the same settings are in" in capsys.readouterr().out
    rows = [json.loads(line) for line in (root / "metadata.proposed.jsonl").read_text().splitlines()]
    assert {row["file_name"]: row["text"] for row in rows} == result.captions and [*result.captions] == NAMES
    assert result.captions["1.png"] == "a toy of colour 9, with a hat, smiling" and result.pictures_per_second > 0
    assert result.left_out == {f"{i}.png": ["with a hat"] for i in (0, 2, 3, 4)}
    assert do(root, "caption", hook, "stage.mode=propose", least=0.5).captions == result.captions
    assert len(hook.seen) == 12, "nothing is left to do"
    do(root, "caption", hook, "stage.mode=propose", least=0)
    assert len(hook.seen) == 12 + NUMBER, "of other settings"


@pytest.mark.parametrize("mode", ["missing", "propose"])
def test_uncertain_phrases_are_left_out_told_and_recorded(root, mode, capsys):
    result = do(root, "caption", Hook(), f"stage.mode={mode}", least=0.5)
    assert result.captions["4.png"] == "a toy of colour 4, smiling", (
        "the first phrase, however uncertain, is the subject"
    )
    assert result.captions["5.png"] == "a toy of colour 5, with a hat, smiling"
    assert result.left_out == {f"{i}.png": ["with a hat"] for i in range(5)}
    told = "left out of 5 captions as uncertain, by captioner.min_confidence=0.5: 5 x 'with a hat'"
    assert told in capsys.readouterr().out.splitlines()
    if mode == "missing":
        journal = [json.loads(line) for line in (root / "captions.history.jsonl").read_text().splitlines()]
        assert {row["file_name"]: row["left_out"] for row in journal if "left_out" in row} == result.left_out
        do(root, "caption", Hook(), "stage.mode=replace")
        assert read_captions(root)["4.png"] == "a toy of colour 4", "0 asks for no confidence"
        assert do(root, "caption", Hook(), "stage.mode=replace", least=0.95).left_out["9.png"] == [
            "with a hat",
            "smiling",
        ]


def test_a_captioner_that_tells_no_confidence_is_named(root, monkeypatch):
    monkeypatch.delattr(ToyCaptioner, "phrases")
    with pytest.raises(InputError, match=r"captioner\.min_confidence=0\.5: ToyCaptioner does not tell its confidence"):
        do(root, "caption", Hook(), least=0.5)
    assert len(do(root, "caption", Hook()).captions) == NUMBER


@pytest.mark.parametrize("form", ["jsonl", "txt"])
@pytest.mark.parametrize("stage", ["caption", "refine"])
def test_an_edit_while_captions_are_written_is_kept(root, stage, form, capsys):
    write_captions(root, {f"{i}.png": f"a cat {i}" for i in range(4 if stage == "caption" else NUMBER)}, form)

    def edit() -> None:  # of a row that is done, one that is not, and one that has none yet
        changes = {"1.png": "edited", "9.png": "edited too", "10.png": "edited last"}
        write_captions(root, read_captions(root) | changes, form)

    result = do(root, stage, Hook(2 if stage == "caption" else 8, edit))
    captions = read_captions(root)
    assert (captions["1.png"], captions["9.png"], captions["10.png"]) == ("edited", "edited too", "edited last")
    assert all(captions[f"{i}.png"] for i in range(NUMBER)) and len(captions) == NUMBER
    written = result.captions if stage == "caption" else result.after
    assert not {"9.png", "10.png"} & written.keys()
    assert "9.png has got another caption meanwhile, which is kept" in capsys.readouterr().out


def test_a_caption_file_that_somebody_damages_loses_no_caption(root):
    with pytest.raises(InputError, match=r"line 1: not JSON.*new captions are in .*metadata\.proposed\.jsonl"):
        do(root, "caption", Hook(6, lambda: (root / "metadata.jsonl").write_text('{"file_na')))
    proposed = [json.loads(line) for line in (root / "metadata.proposed.jsonl").read_text().splitlines()]
    assert {row["file_name"] for row in proposed} == {f"{i}.png" for i in range(7)}
    assert (root / "metadata.jsonl").read_text() == '{"file_na'


LINKS = {
    "captions.history.jsonl": ["caption", "refine"],
    "metadata.jsonl": ["caption", "refine", "convert"],
    "metadata.1.jsonl.bak": ["caption", "refine", "convert"],
    "metadata.proposed.jsonl": ["caption"],
}


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(("link", "stage"), [(link, stage) for link, stages in LINKS.items() for stage in stages])
def test_nothing_is_written_through_a_link(root, link, stage, exists):
    victim = root.parent / ".bashrc"
    if exists:
        victim.write_text('{"file_name": "0.png", "text": "a secret"}\n')
    if link != "metadata.jsonl":
        write_captions(root, {f"{i}.png": "a cat" for i in range(NUMBER - (stage == "caption"))})
    (root / link).symlink_to("../.bashrc")
    before = {path.name: path.read_bytes() for path in root.parent.rglob("*") if path.is_file() and path.name != link}
    hook = Hook()
    with pytest.raises(InputError, match=rf"{link} is a link|no captions|nothing to convert"):
        do(root, stage, hook, *(["stage.mode=propose"] if "proposed" in link else []))
    assert hook.count == 0, "refused before anything is captioned"
    after = {path.name: path.read_bytes() for path in root.parent.rglob("*") if path.is_file() and path.name != link}
    assert after == before and victim.exists() == exists


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "0.txt", "0.caption", "meta_cap.json"])
def test_captions_behind_a_link_out_of_the_folder_are_not_read(root, name):
    secret = root.parent / f"secret{Path(name).suffix}"
    secret.write_text({".jsonl": '{"file_name": "0.png", "text": "a secret"}', ".csv": "file_name,text\n0.png,a secret",
                       ".json": '{"0": {"caption": "a secret"}}'}.get(secret.suffix, "a secret"))  # fmt: skip
    (root / name).symlink_to(secret)
    with pytest.raises(InputError, match=rf"{name} is a link .*dataset\.follow_links=true"):
        read_captions(root)
    assert read_captions(root, follow_links=True) == {"0.png": "a secret"}
    if name != "meta_cap.json":  # which is not written to
        with pytest.raises(InputError, match=rf"{name} is a link"):
            write_captions(root, {"0.png": "mine"})
    assert secret.read_text().count("a secret") == 1


def test_a_name_that_no_caption_file_can_have_is_refused_before_anything_is_captioned(root):
    (root / "0.png").rename(os.fsdecode(os.fsencode(root) + b"/\xff.png"))
    hook = Hook()
    with pytest.raises(InputError, match=r"\\xff\.png.* rename the file"):
        do(root, "caption", hook)
    assert hook.count == 0


@pytest.mark.parametrize("name", ["captions.history.jsonl", "metadata.jsonl", "metadata.proposed.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused_before_anything_is_captioned(root, name, make):
    make(root / name)
    hook = Hook()
    with pytest.raises(InputError, match=rf"{name} is a folder, FIFO or device"):
        do(root, "caption", hook)
    assert hook.count == 0
