"""Read the files of a sweep, also incomplete ones, and rank its runs."""

import json
import math
import random
import subprocess
import sys

import pytest
import yaml
from sweep_folders import draw, fail, finish, measure, stop, write_run, write_sweep

from lora_lab.board.page import axes, fault, format_value, frontier, label, page_data, resemblances, verdict
from lora_lab.board.read import final_validation_loss, read_sweep

LRS = {"lr": [1e-5, 1e-3, 3e-2]}


def test_every_planned_job_has_a_status(tmp_path):
    folders = write_sweep(tmp_path / "sweep", {"rank": [4, 16], "lr": [1e-5, 1e-3]}, missing=1)
    fail(folders[1], "the loss of step 3 is nan")
    stop(folders[2])
    sweep = read_sweep([tmp_path / "sweep"])
    runs = [(run.settings["rank"], run.settings["lr"], run.status, run.error) for run in sweep.runs]
    assert runs == [
        (4, 1e-5, "done", None),
        (4, 1e-3, "failed", "the loss of step 3 is nan"),
        (16, 1e-5, "unfinished", None),
        (16, 1e-3, "missing", None),
    ]
    assert sweep.runs[2].step == 4 and sweep.runs[3].step == 0
    assert sweep.swept == {"rank": [4, 16], "lr": [1e-5, 1e-3]}


def test_a_job_that_was_resumed_alone_is_not_missing(tmp_path):
    folders = write_sweep(tmp_path / "sweep", LRS)
    record = folders[1] / ".hydra" / "overrides.yaml"
    record.write_text(yaml.safe_dump([*yaml.safe_load(record.read_text()), f"resume={folders[1]}", "steps=9"]))
    assert [run.status for run in read_sweep([tmp_path / "sweep"]).runs] == ["done"] * 3


def test_the_page_reads_the_points_that_the_launcher_wrote(tmp_path):
    write_sweep(tmp_path / "sweep", LRS, missing=1)
    points = tmp_path / "sweep" / "points.json"
    listed = json.loads(points.read_text())
    listed[2]["values"]["lr"] = 0.5
    points.write_text(json.dumps(listed))
    (tmp_path / "sweep" / "multirun.yaml").write_text("unreadable: [")
    missing = read_sweep([tmp_path / "sweep"]).runs[2]
    assert (missing.status, missing.settings["lr"], missing.settings["rank"]) == ("missing", 0.5, 4)
    points.write_text("[]")  # of a sweeper that searches
    assert len(read_sweep([tmp_path / "sweep"]).runs) == 2


def test_writing_the_page_imports_neither_hydra_nor_the_command_line(tmp_path):
    write_sweep(tmp_path / "sweep", LRS, missing=1)
    code = (
        "import sys; from pathlib import Path; from lora_lab.board.page import rewrite_page; "
        "assert rewrite_page(Path('sweep')); "
        "sys.exit(str([m for m in sys.modules if (m + '.').startswith(('hydra.', 'lora_lab.launch.'))] or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_interpolations_of_a_record_are_resolved_and_resolvers_are_not_called(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "key")
    folder = write_run(tmp_path / "0", {})
    record = folder / ".hydra" / "config.yaml"
    record.write_text(record.read_text() + "home: ${oc.env:SECRET}/x\nlabel: ${home} of ${trigger}\n")
    (run,) = read_sweep([tmp_path]).runs
    assert run.settings["name"] == "MINT" and run.settings["home"] == "${oc.env:SECRET}/x"
    assert run.settings["label"] == "${oc.env:SECRET}/x of MINT"


def test_pictures_of_several_characters_have_their_triggers(tmp_path):
    prompts = ["A {trigger}", "A {trigger}"]
    write_run(tmp_path / "0", {"trigger": {"mug": "NAMU_MUG", "tofu": "HANA_TOFU"}}, prompts=prompts, steps=(2,))
    (run,) = read_sweep([tmp_path]).runs
    assert [picture.prompt for picture in run.pictures if picture.step == 2] == ["A NAMU_MUG", "A HANA_TOFU"]


def test_options_of_groups_are_swept_keys_and_names_are_not(tmp_path):
    for number, optimizer in enumerate(("adamw", "came")):
        folder = write_run(tmp_path / f"{number}", {"optimizer": optimizer, "name": f"tofu-{number}", "cache": number})
        assert folder.is_dir()
    sweep = read_sweep([tmp_path])
    assert sweep.swept == {"optimizer": ["adamw", "came"]}
    assert [label(run, sweep) for run in sweep.runs] == ["optimizer adamw", "optimizer came"]


def test_keys_of_the_stage_and_of_memory_are_swept_keys(tmp_path):
    swept = {"stage.ema_decay": [0, 0.9], "memory.linear_weights": ["base", "nf4"]}
    for number in (0, 1):
        write_run(tmp_path / f"{number}", {key: values[number] for key, values in swept.items()})
    assert read_sweep([tmp_path]).swept == swept


def test_images_of_a_pipeline_have_their_prompts(tmp_path):
    folder = write_run(tmp_path / "0", {})
    for name in ("config", "hydra"):
        record = folder / ".hydra" / f"{name}.yaml"
        content = yaml.safe_load(record.read_text())
        if name == "config":
            content["stage"] = {"captions": "new", "train": content["stage"]}
        else:
            content["hydra"]["runtime"]["choices"]["stage"] = "pipeline"
        record.write_text(yaml.safe_dump(content))
    (run,) = read_sweep([tmp_path]).runs
    assert {p.prompt for p in run.pictures} == {"A MINT with a green background", "A MINT, winking"}


def test_a_key_that_only_one_run_overrides_is_a_swept_key(tmp_path):
    write_run(tmp_path / "outputs/1/2", {})
    write_run(tmp_path / "multirun/3/4/0", {"rank": 8})
    sweep = read_sweep([tmp_path / "outputs/1/2", tmp_path / "multirun"])
    assert [(run.name, run.settings["rank"]) for run in sweep.runs] == [("outputs/1/2", 4), ("multirun/3/4/0", 8)]
    assert sweep.swept == {"rank": [4, 8]}


def test_images_have_their_step_prompt_and_seed(tmp_path):
    write_run(tmp_path / "0", {}, seeds=(0, 7))
    draw(tmp_path / "0/samples/score/3.png", 8)  # not a validation picture
    (run,) = read_sweep([tmp_path]).runs
    images = {(p.step, p.prompt, p.seed) for p in run.pictures}
    prompts = ("A MINT with a green background", "A MINT, winking")
    assert images == {(step, prompt, seed) for step in (-1, 2, 4) for prompt in prompts for seed in (0, 7)}


def test_incomplete_files_are_read_as_far_as_possible(tmp_path):
    folders = write_sweep(tmp_path / "sweep", LRS)
    with (folders[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    (folders[1] / "result.json").write_text('{"stage"')
    (folders[1] / "metrics.jsonl").write_text('{"ste\n{"step": 2}\n')
    (folders[2] / ".hydra" / "config.yaml").write_text("lr: [")
    sweep = read_sweep([tmp_path / "sweep"])
    assert sweep.runs[0].step == 4
    assert [run.status for run in sweep.runs if run.folder == folders[1]] == ["unfinished"]
    assert folders[2] in [run.folder for run in sweep.runs]


def test_nan_values_are_left_out(tmp_path):
    folder = write_run(tmp_path / "0", {})
    finish(folder, score=(math.nan, 0, 1), subject=(0.5, math.nan, 0.6))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "loss": math.nan}) + "\n")
    (run,) = read_sweep([tmp_path]).runs
    assert list(run.scores) == ["subject"] and run.scores["subject"].low == 0.5
    assert run.step == 4


@pytest.fixture
def three(tmp_path):
    return write_sweep(tmp_path / "sweep", LRS)


def verdict_of(folders):
    sweep = read_sweep([folders[0].parent])
    return verdict(sweep), sweep


def test_the_highest_score_wins_and_runs_within_its_interval_are_tied(three):
    for folder, value in zip(three, (0.62, 0.68, 0.1), strict=True):
        finish(folder, score=(value, value - 0.07, value + 0.05), subject=(1 - value, 0, 1))
    found, _ = verdict_of(three)
    assert (found.measure, found.ranking, found.ties) == ("score", (1, 0, 2), (0,))
    assert found.sentence["en"] == (
        "lr 0.001 has the highest score: 0.68 (0.61 to 0.73). lr 1e-5 (0.62) lies within that interval: a tie."
    )
    assert "lr 0.001" in found.sentence["ko"] and "0.68" in found.sentence["ko"] and "동점" in found.sentence["ko"]


def test_a_best_run_without_ties_is_called_clear(three):
    for folder, value in zip(three, (0.2, 0.68, 0.1), strict=True):
        finish(folder, score=(value, value - 0.01, value + 0.01))
    found, _ = verdict_of(three)
    assert found.ties == () and found.sentence["en"].endswith("No other run reaches that interval.")


def test_a_run_with_less_than_half_of_the_best_score_is_undertrained_or_broken(three):
    for folder, value, contrast in zip(three, (0.2, 0.68, 0.3), (0.45, 0.4, 0.1), strict=True):
        finish(folder, {"contrast": 0.46}, score=(value, value, value), contrast=(contrast, contrast, contrast))
    found, sweep = verdict_of(three)
    best = sweep.runs[found.ranking[0]]
    assert [fault(run, best, found.measure) for run in sweep.runs] == ["little", None, "broken"]
    finish(three[2], {"contrast": 0.46}, score=(0.35, 0.3, 0.4), contrast=(0.1, 0.1, 0.1))  # more than half
    assert fault(verdict_of(three)[1].runs[2], best, "score") is None
    finish(three[2], score=(0.1, 0.1, 0.1))
    assert fault(verdict_of(three)[1].runs[2], best, "score") is None, "its contrast was not measured"


def test_a_best_run_no_better_than_the_base_model_is_no_gain(three):
    for folder in three:
        finish(folder, before={"score": 0.5}, score=(0.4, 0.3, 0.45))
    found, _ = verdict_of(three)
    assert "the base model without a LoRA scores 0.50" in found.sentence["en"]


def test_without_scores_the_validation_loss_decides_and_unfinished_runs_do_not_count(three):
    for folder, loss in zip(three, (0.3, 0.2, 0.1), strict=True):
        measure(folder, loss)
    stop(three[2])
    found, sweep = verdict_of(three)
    assert (found.measure, found.ranking) == ("validation_loss", (1, 0))
    assert final_validation_loss(sweep.runs[1]) == 0.2
    assert found.sentence["en"].startswith("lr 0.001 has the lowest validation loss: 0.2000.")


def test_without_any_measure_there_is_no_best_run(three):
    found, _ = verdict_of(three)
    assert found.ranking == () and "compare the images" in found.sentence["en"]
    for folder in three:
        stop(folder)
    assert verdict_of(three)[0].sentence["en"] == "No run has finished yet."


@pytest.mark.parametrize(
    ("swept", "expected"),
    [
        ({"lr": [1e-5, 1e-3]}, ("lr", "@prompt")),
        ({"lr": [1e-5, 1e-3], "rank": [4, 8]}, ("rank", "lr")),
        ({"lr": [1e-5, 1e-3], "rank": [4, 8], "batch_size": [1, 2]}, ("@run", "@prompt")),
        ({"lr": [1e-5]}, ("@step", "@prompt")),
    ],
)
def test_the_first_axes_show_what_was_swept(tmp_path, swept, expected):
    write_sweep(tmp_path / "sweep", swept)
    assert axes(read_sweep([tmp_path / "sweep"])) == expected


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({}, ()),
        ({3: (0.5, 0.5)}, (3,)),
        ({0: (0.2, 0.9), 1: (0.5, 0.6), 2: (0.4, 0.6), 3: (0.8, 0.1), 4: (0.7, 0.1)}, (0, 1, 3)),
        ({0: (0.5, 0.5), 1: (0.5, 0.5), 2: (0.5, 0.4), 3: (0.4, 0.5)}, (1, 0)),
        ({0: (0.1, 0.2), 1: (0.9, 0.8)}, (1,)),
    ],
)
def test_no_run_beats_one_of_the_frontier_in_both(points, expected):
    assert frontier(points) == expected


def test_the_frontier_is_that_of_its_definition():
    generator = random.Random(0)
    for _ in range(50):
        points = {i: (generator.randint(0, 6), generator.randint(0, 6)) for i in range(generator.randint(1, 30))}
        pairs = {*points.values()}
        beaten = {i for i, (x, y) in points.items() if any(a >= x and b >= y for a, b in pairs - {(x, y)})}
        found = frontier(points)
        assert {*found} == {*points} - beaten and list(map(points.get, found)) == sorted(map(points.get, found))


def test_scores_of_photos_stand_among_those_of_a_training_or_beside_them(three):
    finish(three[0], score=(0.5, 0.4, 0.6), kept=(0.3, 0.2, 0.4), character=(0.8, 0.8, 0.8))
    own = {name: {"value": value, "low": 0, "high": 1} for name, value in (("kept", 0.6), ("character", 0.4))}
    among = {"score": {"value": 0.4, "low": 0.4, "high": 0.4}, "kept": {"value": 0.7, "low": 0.7, "high": 0.7}}
    (three[1] / "result.json").write_text(json.dumps({"stage": "train", "scores": among, **own}))
    finish(three[2], score=(0.45, 0.4, 0.6), kept=(0.9, 0.9, 0.9))
    ranked, sweep = verdict_of(three)
    assert resemblances(sweep) == {0: (0.3, 0.8), 1: (0.7, 0.4)} and ranked.measure == "score"
    data = page_data(sweep, ranked, [], three[0].parent / "page")
    assert data["points"] == [0, 1] and data["frontier"] == (0, 1)
    fail(three[1], "the loss is nan")
    ranked, sweep = verdict_of(three)
    data = page_data(sweep, ranked, [], three[0].parent / "page")
    assert data["points"] == [], "one run alone has no frontier"


def test_numbers_are_written_as_one_types_them():
    assert [format_value(v) for v in (1e-5, 3e-4, 0.03, 1e20, 16, True, "came")] == [
        "1e-5", "0.0003", "0.03", "1e20", "16", "True", "came",
    ]  # fmt: skip
