"""The page of a sweep of stage=img2img: photos and the images that each run drew of them."""

import json

import pytest
from sweep_folders import draw, score_drawings, write_drawings, write_drawn_sweep, write_run

from lora_lab.board.page import axes, page_data, rewrite_page, verdict
from lora_lab.board.read import read_sweep

WEIGHTS = {"stage.lora_weight": [0.6, 1], "stage.strength": [0.8, 0.95]}
PHOTOS = ["/a/me.jpg", "/b/me.jpg", "/b/you.heic"]


@pytest.fixture
def folders(tmp_path):
    return write_drawn_sweep(tmp_path / "sweep", WEIGHTS, PHOTOS, seeds=(0, 7))


def test_photos_are_rows_and_runs_are_columns(folders):
    sweep = read_sweep([folders[0].parent])
    assert sweep.drawn and sweep.swept == WEIGHTS and sweep.training == ()
    assert axes(sweep) == ("@prompt", "@run")
    (first, *_) = sweep.runs
    assert {p.prompt for p in first.pictures} == {"a/me.jpg", "b/me.jpg", "you.heic"}, (
        "two photos of one name are two rows"
    )
    assert [p.file.relative_to(first.folder).as_posix() for p in first.pictures if p.step < 0] == [
        "photos/0.png", "photos/1.png", "photos/2.png"
    ]  # fmt: skip
    drawn = [p for p in first.pictures if p.step == 0]
    assert [(p.prompt, p.seed) for p in drawn[:2]] == [("a/me.jpg", 0), ("a/me.jpg", 7)] and len(drawn) == 6
    assert drawn[5].details == {
        "caption": "a person 2", "prompt": "a MINT 2", "strength": 0.8, "lora_weight": 0.6, "scores": {}
    }  # fmt: skip
    of_two_loras = write_drawn_sweep(
        folders[0].parents[1] / "two", {"lora": ["A", "/b/B.st", "/c/B.st", "B.st"]}, PHOTOS[:1]
    )
    assert read_sweep([of_two_loras[0].parent]).swept == {"lora": ["A", "b/B.st", "c/B.st", "B.st"]}
    one_key = write_drawn_sweep(folders[0].parents[1] / "one", {"stage.strength": [0.5, 0.9]}, PHOTOS[:1])
    assert axes(read_sweep([one_key[0].parent])) == ("@prompt", "stage.strength")


def test_without_scores_the_page_says_that_nothing_was_measured(folders):
    page = rewrite_page(folders[0].parent)
    text = page.read_text()
    assert "There is no measure of these images" in text and '"ranking":[]' in text
    assert (page.parent / "comparison.png").is_file() and (page.parent / "page/0/000000-0-s0.png").is_file()
    assert "stage.photo=me.jpg" in text and "lora=sweep" not in text, "a run that draws is no LoRA"


def test_runs_are_ranked_by_their_mean_resemblance(folders):
    for folder, value in zip(folders, (0.2, 0.7, 0.4, 0.5), strict=True):
        score_drawings(folder, kept=1 - value, resemblance=value)
    result = {"resemblance": {"value": 0.4, "low": 0.3, "high": 0.8}, "kept": {"value": 0.1, "low": 0, "high": 1}}
    (folders[2] / "result.json").write_text(json.dumps(result))  # its own numbers, which have intervals
    sweep = read_sweep([folders[0].parent])
    ranked = verdict(sweep)
    assert (ranked.measure, ranked.ranking) == ("resemblance", (1, 3, 2, 0))
    why = "stage.lora_weight 0.6, stage.strength 0.95 has the highest resemblance: 0.70."
    assert ranked.sentence["en"] == why, "a mean has no interval"
    assert sweep.runs[2].scores["resemblance"].high == 0.8 and sweep.runs[0].scores["kept"].value == 0.8
    data = page_data(sweep, ranked, [], folders[0].parent / "page")
    assert data["points"] == [] and data["frontier"] == (), "no run has a number for the character"
    assert data["drawn"] and data["runs"][1]["pictures"][-1][5]["scores"] == {"kept": 0.3, "resemblance": 0.7} | {
        "kept": pytest.approx(0.3)
    }


def test_trainings_are_not_compared_with_drawings(folders, tmp_path):
    write_run(tmp_path / "trained", {"lr": 1e-3})
    sweep = read_sweep([tmp_path])
    assert not sweep.drawn and [run.name for run in sweep.runs] == ["trained"]


def test_lines_that_a_stranger_wrote_lead_nowhere(folders, tmp_path):
    draw(tmp_path / "private.png", 32)
    first, second = folders[:2]
    (first / "photos" / "0.png").unlink()
    (first / "photos" / "0.png").symlink_to(tmp_path / "private.png")
    (first / "9-s0.png").symlink_to(tmp_path / "private.png")
    odd = [
        {},
        {"photo": 3},
        {"photo": "\ud800/x.jpg", "seed": 0, "picture": "1-s0.png"},
        {"photo": "/a/me.jpg", "seed": "x", "picture": "0-s0.png"},
    ]
    outside = [
        {"photo": "/x/p.jpg", "seed": 0, "picture": name} for name in ("../../private.png", "9-s0.png", "\0-s0.png")
    ]
    scores = {"scores": {"kept": float("inf"), "character": "high", "resemblance": 0.5}}
    known = {"photo": "/a/me.jpg", "seed": 0, "picture": "0-s0.png", "prompt": "x" * 9999, "strength": [], **scores}
    write_drawings(first, [*odd, *outside, known])
    (second / "prompts.jsonl").write_text("[1]\n{}\n")
    runs = read_sweep([first.parent]).runs
    *_, strange, picture = runs[0].pictures
    assert {p.file.name for p in runs[0].pictures} == {"1.png", "1-s0.png", "0-s0.png"} and strange.prompt == "x.jpg"
    assert picture.details["scores"] == {"resemblance": 0.5} and len(picture.details["prompt"]) == 2000
    assert "prompts.jsonl is damaged" in runs[1].error and runs[1].pictures == ()
    assert rewrite_page(first.parent)
    assert not list((first.parent / "page" / "0").glob("0.png"))
