"""A sweep that W&B tracks offline, read back from its files."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from sweep_folders import draw, write_sweep
from sweep_runs import ended, pictures, start
from wandb_files import WANDB, inspect, isolated

from lora_lab.board.page import attach_page, rewrite_page
from lora_lab.settings.schema import Tracker

pytestmark = pytest.mark.slow

SWEEP = (
    "-m", "stage=train", "dataset=folder", "dataset.root=tofu", "refiner=off", "device=cpu", "tracker=wandb",
    "tracker.mode=offline", "tracker.project=tofu", "rank=2,4", "lr=1e-3", "steps=4", "batch_size=1",
    "sampler.steps=1", "model.resolution=64", "stage.validate_every=2", "hydra.sweep.dir=multirun/day/time",
    "stage.prompts=['A {trigger}','A red {trigger}']", "hydra/launcher=packed",
)  # fmt: skip
TABLE = ["rank", "lr", "step", "prompt", "seed", "picture"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The runs of a sweep of two jobs: theirs in their order, and the comparison."""
    root = tmp_path_factory.mktemp("sweep")
    environment = isolated(root)
    work = root / "here"
    pictures(work)
    code, _, output = ended(start(work, *SWEEP, **environment))
    assert code == 0, output
    folder = work / "multirun" / "day" / "time"
    runs = [tracked(folder / "0"), tracked(folder / "1"), tracked(folder)]
    left = [*(root / "home").rglob("*wandb*"), *(root / "temporary").rglob("*")]
    elsewhere = [path for path in left if not path.name.startswith("debug-cli")]  # that of `wandb leet`
    return SimpleNamespace(
        root=root, work=work, folder=folder, jobs=runs[:2], comparison=runs[2], runs=runs, elsewhere=elsewhere
    )


def tracked(folder: Path) -> SimpleNamespace:
    """The one offline run in `folder`."""
    (path,) = folder.glob("wandb/offline-run-*")
    records = inspect(str(path))
    return SimpleNamespace(
        path=path,
        opened=next(record["run"] for record in records if record["type"] == "run"),
        rows=[record["history"]["item"] for record in records if record["type"] == "history"],
        artifacts=[record["artifact"] for record in records if record["type"] == "artifact"],
        summary=inspect(str(path), "--summary"),
    )


def contents(artifact: dict) -> Iterator[tuple[str, Path]]:
    """Name and staged file of everything in it."""
    for entry in artifact["manifest"]["contents"]:
        yield entry["path"], Path(entry["local_path"])


def test_a_sweep_is_one_group_of_its_jobs_and_one_comparison(sweep):
    assert [run.opened.get("job_type") for run in sweep.runs] == [None, None, "compare"]
    assert [run.opened["run_group"] for run in sweep.runs] == 3 * ["day-time"]
    assert [run.opened["project"] for run in sweep.runs] == 3 * ["tofu"]
    assert [run.opened["display_name"] for run in sweep.runs] == [
        "HANA_TOFU rank 2 lr 0.001 steps 4", "HANA_TOFU rank 4 lr 0.001 steps 4", "comparison"
    ]  # fmt: skip
    assert len({run.opened["run_id"] for run in sweep.runs}) == 3
    assert [run.summary["exit_code"] for run in sweep.runs] == [0, 0, 0]


def test_every_job_has_the_same_keys_and_its_own_settings(sweep):
    one, other = ({key for row in run.rows for key in row} for run in sweep.jobs)
    assert (
        one == other
        and {"train/loss", "train/lr", "score/score", "score/subject", "pictures.path", "global_step"} <= one
    )
    configs = [run.summary["config"] for run in sweep.jobs]
    assert [(config["rank"], config["lr"], config["adapter"]["r"]) for config in configs] == [
        (2, 1e-3, 2), (4, 1e-3, 4)
    ]  # fmt: skip
    assert configs[0].keys() == configs[1].keys()


def test_every_job_shows_the_same_prompts_at_the_same_steps(sweep):
    for run, rank in zip(sweep.jobs, (2, 4), strict=True):
        shown = [(row["global_step"], row) for row in run.rows if "validation/p0-s0.path" in row]
        assert [step for step, _ in shown] == [2, 4]
        for (step, row), (key, prompt) in product(shown, (("p0-s0", "A HANA_TOFU"), ("p1-s0", "A red HANA_TOFU"))):
            assert row[f"validation/{key}.caption"] == f"{prompt} | rank {rank}, lr 0.001, step {step}, seed 0"
            drawn = run.path.parents[1] / "samples" / f"step-{step:06d}" / f"{key}.png"
            assert pixels(run.path / "files" / row[f"validation/{key}.path"]) == pixels(drawn)


def test_every_job_has_a_table_with_a_row_for_every_scored_picture(sweep):
    tables = []
    for run, rank in zip(sweep.jobs, (2, 4), strict=True):
        (file,) = run.path.glob("files/media/table/pictures*.table.json")
        table = json.loads(file.read_text())
        job = run.path.parents[1]
        lines = [line for line in map(json.loads, (job / "scores.jsonl").read_text().splitlines()) if line["lora"]]
        assert len(lines) > 4 and table["columns"][: len(TABLE)] == TABLE
        for row, line in zip(table["data"], lines, strict=True):
            cells = dict(zip(table["columns"], row, strict=True))
            assert [cells[name] for name in TABLE[:-1]] == [rank, 1e-3, 4, line["prompt"], line["seed"]]
            assert {name: cells[f"score/{name}"] for name in line["scores"]} == line["scores"]
        (artifact,) = run.artifacts  # the table's own
        assert all(job in file.parents for _, file in contents(artifact))
        kept = {pixels(file) for name, file in contents(artifact) if name.endswith(".png")}
        assert kept == {pixels(file) for file in (job / "samples" / "score").glob("*.png")}
        tables.append(table)
    assert tables[0]["columns"] == tables[1]["columns"] and tables[0]["data"] != tables[1]["data"]


def pixels(file: Path) -> bytes:
    return Image.open(file).convert("RGB").tobytes()


def test_the_comparison_is_one_artifact_with_the_page_and_its_thumbnails(sweep):
    run = sweep.comparison
    (artifact,) = run.artifacts
    assert (artifact["type"], artifact["name"]) == ("comparison", "comparison-day-time")
    staged = dict(contents(artifact))
    page = [sweep.folder / "index.html", sweep.folder / "comparison.png", *(sweep.folder / "page").glob("*/*")]
    assert len(page) > 14
    assert staged.keys() == {file.relative_to(sweep.folder).as_posix() for file in page}
    for name, file in staged.items():
        assert file.read_bytes() == (sweep.folder / name).read_bytes(), name
        assert sweep.folder in file.parents
    (row,) = run.rows
    assert pixels(run.path / "files" / row["comparison.path"]) == pixels(sweep.folder / "comparison.png")
    assert not [artifact for job in sweep.jobs for artifact in job.artifacts if artifact["type"] == "comparison"]


def test_one_command_finds_every_run_of_the_sweep_and_nothing_lies_elsewhere(sweep):
    command = 'wandb sync --dry-run "$1"/wandb/offline-run-* "$1"/*/wandb/offline-run-*'
    shell = ["sh", "-c", command, "sh", sweep.folder.relative_to(sweep.work).as_posix()]
    environment = isolated(sweep.root, PATH=f"{Path(WANDB).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(shell, cwd=sweep.work, env=environment, capture_output=True, text=True, check=True)
    output = done.stdout + done.stderr
    assert "3 run(s)" in output and all(run.path.name in output for run in sweep.runs)
    assert sweep.elsewhere == []


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The folder of a sweep with its page, and the function that tracks it."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "multirun" / "day" / "time"
    write_sweep(folder, {"lr": [1e-4, 1e-3]})
    rewrite_page(folder)
    return SimpleNamespace(folder=folder, attach=lambda **more: attach_page(folder, tracker(**more)))


def tracker(**more) -> Tracker:
    return Tracker(**{"kind": "wandb", "project": "tofu", "mode": "offline", "group": "day/time", "tags": ["a"]} | more)


def test_a_page_is_logged_again_only_if_it_has_changed(page, capsys):
    page.attach()
    (first,) = page.folder.glob("wandb/offline-run-*")
    printed = capsys.readouterr().out
    assert printed == f"tracking offline (as configured); to upload: wandb sync multirun/day/time/wandb/{first.name}\n"
    rewrite_page(page.folder)
    page.attach()
    assert list(page.folder.glob("wandb/offline-run-*")) == [first] and capsys.readouterr().out == ""
    draw(page.folder / "0" / "samples" / "step-000004" / "p0-s0.png", 16, "red")
    rewrite_page(page.folder)
    page.attach()
    runs = [inspect(str(path)) for path in sorted(page.folder.glob("wandb/offline-run-*"), key=os.path.getmtime)]
    opened = [record["run"] for run in runs for record in run if record["type"] == "run"]
    logged = [record["artifact"] for run in runs for record in run if record["type"] == "artifact"]
    assert len({run["run_id"] for run in opened}) == 1 and len(opened) == 2  # the next version, in the same run
    assert {artifact["name"] for artifact in logged} == {"comparison-day-time"}
    assert len({artifact["digest"] for artifact in logged}) == 2


def test_a_page_that_cannot_be_logged_is_reported_in_one_line(page, capsys, caplog):
    (page.folder / "comparison.png").unlink()
    page.attach()
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert output.startswith("lora_lab: the comparison page of multirun/day/time could not be logged (")
    rewrite_page(page.folder)
    shutil.rmtree(page.folder / "wandb")
    (page.folder / "wandb").write_text("a file where the folder should be")
    page.attach()
    assert [record.message.partition(":")[0] for record in caplog.records if record.name.startswith("lora_lab")] == [
        "tracking could not be started, the run continues without it"
    ]
