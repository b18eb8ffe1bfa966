"""The folder of the page: its files, its errors, and what it never does."""

import json
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from sweep_folders import draw, fail, finish, measure, stop, write_run, write_sweep

from lora_lab import board
from lora_lab.board.page import files_to_share, rewrite_page
from lora_lab.errors import InputError
from lora_lab.launch import command_line, config
from lora_lab.launch.command_line import expand_resume
from lora_lab.launch.config import check_inputs
from lora_lab.launch.run_job import run_stage

HERE = Path(board.__file__).parent


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """multirun/day/time with a done, a failed, a stopped and a missing job, as seen from the working folder."""
    monkeypatch.chdir(tmp_path)
    root = Path("multirun/day/time")
    folders = write_sweep(root, {"rank": [4, 16], "lr": [1e-5, 1e-3]}, missing=1, side=300)
    finish(folders[0], score=(0.5, 0.4, 0.6))
    fail(folders[1], "the loss is nan </script><b>")
    stop(folders[2])
    return root


def data(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    return json.loads(found[1])


def files(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_the_page_has_every_image_and_its_thumbnail(sweep):
    page = rewrite_page(sweep)
    assert page == sweep / "index.html"
    expected = {f"{step}p{p}-s0" for step in ("", "000002-", "000004-") for p in (0, 1)}
    assert files(sweep / "page" / "0") == {f"{name}{suffix}" for name in expected for suffix in (".png", ".webp")}
    whole = sweep / "page/0/000004-p1-s0.png"
    assert whole.samefile(sweep / "0/samples/step-000004/p1-s0.png")  # takes no room
    with Image.open(whole.with_suffix(".webp")) as small:
        assert small.format == "WEBP" and small.size == (256, 256)
    assert len(files(sweep / "page" / "training")) == 4
    with Image.open(sweep / "comparison.png") as sheet:
        assert sheet.width > 2 * 192 and sheet.height > 4 * 192  # the base and three runs, two prompts
    assert not [name for name in files(sweep) if "/." in name.replace("/.hydra/", "/")]  # nothing temporary is left


def test_an_error_sentence_is_escaped(sweep):
    page = rewrite_page(sweep)
    assert data(page)["runs"][1]["error"] == "the loss is nan </script><b>"
    assert "nan </script><b>" not in page.read_text()


def test_changed_images_are_updated(sweep):
    rewrite_page(sweep)
    source = sweep / "0/samples/step-000004/p0-s0.png"
    draw(source.with_name("new.png"), 300, colour="#070707")
    source.with_name("new.png").replace(source)
    rewrite_page(sweep)
    for suffix in (".png", ".webp"):
        with Image.open(sweep / f"page/0/000004-p0-s0{suffix}") as picture:
            assert abs(picture.convert("RGB").getpixel((9, 9))[0] - 7) < 3


def test_a_small_image_is_its_own_thumbnail(sweep):
    source, file = sweep / "0/samples/step-000004/p0-s0.png", sweep / "page/0/000004-p0-s0.png"
    for side, suffix in ((256, "png"), (257, "webp"), (200, "png")):  # a thumbnail of the image before is removed
        draw(source.with_name("new.png"), side)
        source.with_name("new.png").replace(source)
        shown = {name: thumbnail for *_, name, thumbnail in data(rewrite_page(sweep))["runs"][0]["pictures"]}
        assert shown["000004-p0-s0"] == suffix and file.with_suffix(".webp").is_file() == (suffix == "webp")
        assert f"page/0/000004-p0-s0.{suffix}" in files_to_share(sweep)
    assert "page/0/000002-p0-s0.png" not in files_to_share(sweep)  # a full-size image


def test_a_damaged_image_is_left_out(sweep):
    source = sweep / "0/samples/step-000004/p0-s0.png"
    source.write_bytes(source.read_bytes()[:60])
    shown = data(rewrite_page(sweep))["runs"][0]["pictures"]
    assert "000004-p0-s0" not in [name for *_, name, _ in shown] and len(shown) == 5


def test_unchanged_images_are_not_written_again(sweep):
    rewrite_page(sweep)
    before = {name: (sweep / "page" / name).stat().st_ino for name in files(sweep / "page")}
    rewrite_page(sweep)
    assert {name: (sweep / "page" / name).stat().st_ino for name in files(sweep / "page")} == before


def test_pictures_on_another_disk_are_copied(sweep, monkeypatch):
    def refuse(*_):
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", refuse)
    rewrite_page(sweep)
    whole, source = sweep / "page/0/000004-p0-s0.png", sweep / "0/samples/step-000004/p0-s0.png"
    assert whole.read_bytes() == source.read_bytes() and not whole.samefile(source)


def test_a_page_of_another_program_is_not_overwritten(sweep, capsys):
    (sweep / "index.html").write_text("<h1>mine</h1>")
    assert rewrite_page(sweep) is None
    assert (sweep / "index.html").read_text() == "<h1>mine</h1>"
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "index.html is not a comparison page" in output


def test_a_page_that_cannot_be_written_is_reported_in_one_line(sweep, capsys):
    (sweep / "page").write_text("in the way")
    assert rewrite_page(sweep) is None
    output = capsys.readouterr().err
    assert (
        output.startswith("lora_lab: the comparison page of multirun/day/time could not be written")
        and output.count("\n") == 1
    )


def test_a_sweep_that_trains_nothing_gets_no_page(tmp_path):
    folder = write_run(tmp_path / "sweep" / "0", {})
    record = folder / ".hydra" / "hydra.yaml"
    record.write_text(record.read_text().replace("stage: train", "stage: check"))
    assert rewrite_page(tmp_path / "sweep") is None and not (tmp_path / "sweep" / "index.html").exists()


def test_several_jobs_may_end_at_the_same_time(sweep, capsys):
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(rewrite_page, [sweep] * 4)) == {sweep / "index.html"}
    assert capsys.readouterr().err == ""
    assert len(data(sweep / "index.html")["runs"]) == 4
    assert [name for name in files(sweep) if Path(name).name.startswith(".")] == [".page.lock"]


def test_the_commands_of_a_run_are_accepted_by_the_program(sweep):
    done, failed, stopped, missing = (r["commands"] for r in data(rewrite_page(sweep))["runs"])
    assert done["repeat"] == "python -m lora_lab stage=train rank=4 lr=1e-05"
    assert done["go_on"] == "python -m lora_lab resume=multirun/day/time/0 steps=6"
    assert stopped["go_on"] == "python -m lora_lab resume=multirun/day/time/2"
    assert done["use"] == ("python -m lora_lab stage=img2img lora=multirun/day/time/0 trigger=MINT stage.photo=me.jpg")
    assert set(missing) == {"repeat"} and "use" not in failed
    config.register()
    for command in (*done.values(), missing["repeat"]):
        arguments = command_line.read_arguments(shlex.split(command)[3:])
        assert command_line.check(expand_resume(arguments.overrides, arguments.multirun)[0], arguments.multirun)


def test_stage_compare_writes_the_page_of_a_sweep_and_returns_the_winner(sweep, composed, capsys):
    photos = {"kept": (0.5, 0.5, 0.5), "character": (0.4, 0.4, 0.4)}
    finish(sweep / "2", score=(0.45, 0.3, 0.6), **photos)
    result = run_stage(composed("stage=compare", f"stage.folder={sweep}"), Path("out"))
    assert result.page == f"{sweep}/index.html" and Path(result.picture).is_file()
    result_file = json.loads(Path("out/result.json").read_text())
    assert result_file["winner"] == f"{sweep}/0" and result_file["ties"] == [f"{sweep}/2"]
    assert result_file["frontier"] == [f"{sweep}/2"]
    assert result_file["ranking"] == [f"{sweep}/0", f"{sweep}/2"]
    assert result_file["runs"] == {"done": 2, "failed": 1, "unfinished": 0, "missing": 1}
    output = capsys.readouterr().out
    assert "rank 4, lr 1e-5 has the highest score: 0.50 (0.40 to 0.60)" in output and result.page in output


def test_stage_compare_lists_the_missing_jobs_of_a_sweep_without_points(sweep, composed):
    (sweep / "points.json").unlink()  # as older versions left it
    result = run_stage(composed("stage=compare", f"stage.folder={sweep}"), Path("out"))
    assert result.runs == {"done": 1, "failed": 1, "unfinished": 1, "missing": 1}


def test_stage_compare_puts_the_page_of_several_folders_into_its_own(sweep, composed):
    other = write_run(Path("outputs/day/noon"), {"lr": 1e-2})
    measure(other, 0.1)
    result = run_stage(composed("stage=compare", f"stage.folder=[{sweep},{other}]"), Path("out"))
    assert result.page == "out/index.html" and not (sweep / "index.html").exists()
    assert len(data(Path(result.page))["runs"]) == 5
    assert Path("out/page/outputs-day-noon/000004-p0-s0.png").is_file()


def test_stage_compare_refuses_what_it_cannot_compare(sweep, composed):
    Path("empty").mkdir()
    with pytest.raises(InputError, match="no training runs in empty: name a sweep's folder, or run folders"):
        run_stage(composed("stage=compare", "stage.folder=empty"), Path("out"))
    with pytest.raises(InputError, match=r"multirun/day/tme: there is no such file or folder, did you mean"):
        check_inputs(composed("stage=compare", "stage.folder=multirun/day/tme"))
    for wrong in ("[]", "null"):
        with pytest.raises(Exception, match="name a sweep's folder"):
            composed("stage=compare", f"stage.folder={wrong}")
    for number in ("3", "[3]"):  # the name of a folder
        with pytest.raises(InputError, match=r"stage\.folder=3: there is no such file or folder"):
            check_inputs(composed("stage=compare", f"stage.folder={number}"))


def test_the_page_may_be_moved(sweep):
    page = rewrite_page(sweep)
    links = re.findall(r'(?:src|href)="([^"#]+)"', page.read_text())
    assert [link for link in links if not link.startswith("data:")] == []
    assert str(Path.cwd()) not in page.read_text()


def test_every_text_is_there_in_both_languages():
    texts = json.loads((HERE / "words.json").read_text(encoding="utf-8"))
    programs = ("page.js", "matrix.js", "zoom.js", "runs.js", "page.py")
    program = "".join((HERE / name).read_text(encoding="utf-8") for name in programs)
    template = (HERE / "template.html").read_text(encoding="utf-8")
    used = set(re.findall(r'\bsay\(\s*"(\w+)"', program)) | set(re.findall(r'word\("(\w+)"\)', template))
    assert len(used) > 40 and used <= set(texts)
    scores = (HERE.parents[1] / "docs" / "scores.md").read_text(encoding="utf-8")
    measures = set(re.findall(r"^\| `(\w+)` \| (?:higher|lower|neither)", scores, re.M))
    assert len(measures) > 8 and measures <= set(texts)
    for key, text in texts.items():
        assert set(text) == {"en", "ko"} and all(text.values()), key
        assert set(re.findall(r"{\w+}", text["en"])) == set(re.findall(r"{\w+}", text["ko"])), key


def test_text_has_enough_contrast():
    css = (HERE / "page.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+):\s*(#\w{6});", part)) for part in css.split("prefers-color-scheme", 1))
    for colours in (light, dark):
        pairs = [("ink", "page"), ("soft", "page"), ("soft", "panel"), ("soft", "faint"), ("accent", "page"),
                 ("on-accent", "accent"), ("bad", "bad-soft"), ("ink", "accent-soft")]  # fmt: skip
        for text, behind in pairs:
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)


def contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_uplot_is_named_with_its_licence():
    notice = (HERE.parents[1] / "NOTICE").read_text(encoding="utf-8")
    version = re.search(r"uPlot \(v([\d.]+)\)", (HERE / "uplot.min.js").read_text(encoding="utf-8"))[1]
    assert f"uPlot {version}" in notice and "Copyright (c) 2022 Leon Sorokin" in notice
