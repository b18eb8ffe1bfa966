"""stage=compare of run folders that somebody else wrote, or a crash damaged."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from sweep_folders import finish, write_run, write_sweep

from lora_lab.board.page import files_to_share

BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30))
DAMAGE = (  # a file of a run, and what stands in it
    (".hydra/config.yaml", "lr: ["), (".hydra/config.yaml", ""), (".hydra/config.yaml", "[1, 2]"),
    (".hydra/config.yaml", BOMB), (".hydra/config.yaml", MERGES), (".hydra/config.yaml", "x: " + "[" * 100_000),
    (".hydra/config.yaml", "- " * 100_000 + "x"), (".hydra/config.yaml", "x: " + "y" * 2**21),
    (".hydra/config.yaml", "x: 2024-99-99"), (".hydra/hydra.yaml", "hydra: 3"), (".hydra/hydra.yaml", BOMB),
    (".hydra/overrides.yaml", ""), (".hydra/overrides.yaml", "lr: 3"), (".hydra/overrides.yaml", "\x00"),
    ("result.json", '{"stage"'), ("result.json", "[1]"), ("result.json", "[" * 100_000), ("failed.json", "3"),
    ("metrics.jsonl", '{"ste\n{"step": 2}\n'), ("metrics.jsonl", "5\n6\n"), ("metrics.jsonl", '{"loss": 1}\n{}\n'),
    ("validation.jsonl", '{"step": "x", "loss": 1}\n\n'),
)  # fmt: skip
SECRETS = (  # each with the environment's value, if a resolver of the record is called
    "${oc.env:SECRET}", "${oc.env:SECRET,x}", "${ oc.env:SECRET }", "${${resolver}:SECRET}", "${oc.${part}:SECRET}",
    "\\${oc.env:SECRET}", "\\\\${oc.env:SECRET}", "${oc.decode:'${oc.env:SECRET}'}", "${stage.prompts}${oc.env:SECRET}",
)  # fmt: skip
NAMES = ("constructor", "__proto__", "toString", "hasOwnProperty", "<img src=x onerror=document.title=1>")


def page_data(folder: Path) -> dict:
    page = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def change_config(run: Path, **settings: object) -> None:
    record = run / ".hydra" / "config.yaml"
    record.write_text(yaml.safe_dump(yaml.safe_load(record.read_text()) | settings))


def compare(type_in, *words: str) -> str:
    code, out, err = type_in("stage=compare", "stage.folder=runs", "hydra.run.dir=page", *words)
    assert (code, err) == (0, "")
    return out


def test_a_damaged_file_is_named_and_the_other_runs_are_compared(type_in, tmp_path):
    for number, (name, content) in enumerate(DAMAGE):
        run = write_run(tmp_path / "runs" / f"{number:02d}", {}, steps=(1,), side=2)
        (run / name).write_text(content)
    os.mkfifo(write_run(tmp_path / "runs" / "fifo", {}, steps=(1,), side=2) / "validation.jsonl")
    for name, value in (("good", 0.5), ("better", 0.6)):
        finish(write_run(tmp_path / "runs" / name, {}, steps=(1,), side=2), score=(value, value, value))
    out = compare(type_in)
    assert [Path(run).name for run in json.loads((tmp_path / "page/result.json").read_text())["ranking"]] == [
        "better",
        "good",
    ]
    errors = {run["name"]: run["error"] for run in page_data(tmp_path / "page")["runs"]}
    for number, (name, _) in enumerate(DAMAGE):
        sentence = errors.pop(f"{number:02d}")
        assert f"runs/{number:02d}/{name} " in sentence and len(sentence) < 400 and "\n" not in sentence
        assert sentence in out
    assert "fifo/validation.jsonl is missing" in errors.pop("fifo") and errors == {"good": None, "better": None}


def test_the_jobs_of_a_damaged_points_json_are_left_out_with_a_line(type_in, tmp_path):
    for content in ("{", "[3]", '{"a": 1}', '[{"number": "x", "overrides": [], "values": {}}]'):
        write_run(tmp_path / "runs" / "0", {}, steps=(1,), side=2) if not (tmp_path / "runs").exists() else None
        (tmp_path / "runs" / "points.json").write_text(content)
        assert "points.json is damaged" in compare(type_in)


def test_no_resolver_of_a_record_is_called(type_in, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "the-value-of-the-environment")
    for number, text in enumerate(SECRETS):
        run = write_run(tmp_path / "runs" / str(number), {"lr": number + 1.0, "name": text}, steps=(1,), side=2)
        change_config(run, lr=text, trigger=text, resolver="oc.env", part="env", steps=text)
        finish(run, score=(0.1, 0.1, 0.1))
    assert "the-value-of" not in compare(type_in)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert "${oc.env:SECRET}" in page_data(tmp_path / "page")["swept"]["lr"] and len(files) > len(SECRETS)
    assert not [file for file in files if b"the-value-of" in file.read_bytes()]


def test_only_images_in_the_run_folder_are_shown(type_in, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    for name in ("p0-s0.png", "p1-s0.png"):
        Image.new("RGB", (8, 8), "red").save(private / name)
    linked, folder, plain = (write_run(tmp_path / "runs" / name, {}, steps=(1,)) for name in ("0", "1", "2"))
    for run in (linked, folder, plain):
        change_config(run, dataset={"root": str(private)})
    (linked / "samples/step-000001/p0-s0.png").unlink()
    (linked / "samples/step-000001/p0-s0.png").symlink_to(private / "p0-s0.png")
    (folder / "samples/step-000002").symlink_to(private)
    out, data = compare(type_in), page_data(tmp_path / "page")
    assert [len(run["pictures"]) for run in data["runs"]] == [3, 4, 4] and data["training"] == []
    assert f"add dataset.root={private} if you know that folder" in out
    images = [file for file in files_to_share(tmp_path / "page").values() if file.suffix != ".html"]
    shown = [Image.open(file).getpixel((0, 0)) for file in images]
    assert not [colour for colour in shown if colour[0] > 250 and max(colour[1:]) < 5]
    assert "if you know that folder" not in compare(type_in, f"dataset.root={private}", "dataset=folder")
    assert len(page_data(tmp_path / "page")["training"]) == 2


def test_nothing_is_written_through_a_link(type_in, tmp_path):
    mine = tmp_path / "mine"
    (mine / "folder").mkdir(parents=True)
    (mine / "file.webp").write_text("mine")
    write_sweep(tmp_path / "runs", {"lr": [0.1, 0.2]}, steps=(1,))
    (tmp_path / "runs/page/0").mkdir(parents=True)
    for name in ("page/0/000001-p0-s0.webp", "page/0/000001-p0-s0.png", "comparison.png"):
        (tmp_path / "runs" / name).symlink_to(mine / "file.webp")
    assert type_in("stage=compare", "stage.folder=runs")[0] == 0
    for name in ("page/1", "page/training", "page"):
        shutil.rmtree(tmp_path / "runs" / name)
        (tmp_path / "runs" / name).symlink_to(mine / "folder")
        code, _, err = type_in("stage=compare", "stage.folder=runs")
        assert code == 2 and "a link, not a folder of a comparison page" in err and err.count("\n") == 1
        (tmp_path / "runs" / name).unlink()
        (tmp_path / "runs" / name).mkdir()
    assert (mine / "file.webp").read_text() == "mine" and not any((mine / "folder").iterdir())


def test_values_that_json_cannot_hold_are_shown_as_text(type_in, tmp_path):
    values = (
        ".nan",
        ".inf",
        "2024-01-01",
        "!!binary aGFuYQ==",
        "1" + "0" * 400,
        "!!set {a, b}",
        "[.nan, {1: 2}]",
        "\\ud800",
    )
    for number, text in enumerate(values):
        run = write_run(tmp_path / "runs" / str(number), {"lr": number}, steps=(1,), side=2)
        record = run / ".hydra" / "config.yaml"
        record.write_text(re.sub(r"(?m)^lr: .*", lambda _, text=text: f"lr: {text}", record.read_text()))
        (run / "failed.json").write_text('{"error": "half a letter: \\ud800"}')
    compare(type_in)
    assert len(page_data(tmp_path / "page")["swept"]["lr"]) == len(values)


def test_references_to_references_take_no_time(type_in, tmp_path):
    run = write_run(tmp_path / "runs" / "0", {}, steps=(1,), side=2)
    chain = {f"a{i}": f"${{a{i + 1}}}" * 9 for i in range(40)} | {f"b{i}": [f"${{b{i + 1}}}"] * 9 for i in range(40)}
    change_config(run, **chain, trigger="${a0}", steps="${b0}", name="${name}")
    compare(type_in)
    assert len(page_data(tmp_path / "page")["runs"]) == 1


@pytest.mark.slow
def test_names_and_texts_of_a_record_are_only_text_in_the_page(type_in, tmp_path, chromium):
    for number, name in enumerate(NAMES):
        run = write_run(tmp_path / "runs" / str(number), {"lr": number, "trigger": name}, prompts=NAMES[-1:])
        record = run / ".hydra" / "overrides.yaml"
        record.write_text(yaml.safe_dump([*yaml.safe_load(record.read_text()), *(f"+{n}={number}" for n in NAMES)]))
        change_config(run, **dict.fromkeys(NAMES, number))
        scores = {name: dict.fromkeys(("value", "low", "high"), 0.1 * number)}
        largest = dict.fromkeys(("value", "low", "high"), (-1) ** number * 1.7e308)
        scores |= {"kept": largest, "character": largest}
        (run / "result.json").write_text(json.dumps({"seconds": 1, "scores": scores, "scores_before": scores}))
    compare(type_in)
    page, errors = chromium.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "page" / "index.html").as_uri())
    heads = page.locator("#table th").all_inner_texts()
    page.locator("#language").click()
    page.select_option("#rows", "@run")
    assert page.locator("img[src=x]").count() == 0 and page.title() != "1"
    page.close()
    assert errors == [] and set(NAMES) <= set(heads)
