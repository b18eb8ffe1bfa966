"""The comparison page: index.html, comparison.png and page/ with every picture, a folder that can be moved."""

import json
import os
import shlex
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL import Image

from lora_lab.board.curves import smoothed
from lora_lab.board.read import Picture, Run, Sweep, last_loss, validation_loss
from lora_lab.board.verdict import Verdict, axes, fault, label, words
from lora_lab.errors import InputError
from lora_lab.images.pixels import open_picture
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import write_atomically, write_text

HERE = Path(__file__).parent
STYLES, PROGRAM = ("uplot.min.css", "page.css"), ("uplot.min.js", "page.js", "matrix.js", "zoom.js", "runs.js")
OURS = '<meta name="generator" content="lora_lab">'  # an index.html without it is somebody else's
THUMBNAIL = 256  # px
POINTS = 200  # of a curve: more than a page is wide for
SHEET_ROWS = 24  # of comparison.png; the best ones


def write_page(sweep: Sweep, judged: Verdict, to: Path) -> Path:
    """Write the page of `sweep` into `to`; returns index.html.

    Several processes may do so at a time: every file is whole, and the last one to write wins.
    Raises InputError where `to` has an index.html of somebody else."""
    page = to / "index.html"
    if page.is_file() and OURS not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise InputError(f"{page} is not a comparison page: move it away, or name another folder with hydra.run.dir=")
    assets = to / "page"
    runs = [
        replace(run, pictures=tuple(p for p in run.pictures if _show(p.file, assets / slug(run), stem(p))))
        for run in sweep.runs
    ]
    sweep = replace(sweep, runs=tuple(runs))
    training = [name for i, file in enumerate(sweep.training) if (name := _show_training(file, assets / "training", i))]
    write_atomically(to / "comparison.png", sheet(sweep, judged, assets).save)
    write_text(page, html(page_data(sweep, judged, training), sweep, judged))
    return page


def shared(page: Path) -> dict[str, Path]:
    """The files of the page in the folder `page` by their names in it, but for the large pictures: these are nearly all
    of it, and the page shows the small ones in their place."""
    files = [page / "index.html", page / "comparison.png", *sorted((page / "page").rglob("*.webp"))]
    return {file.relative_to(page).as_posix(): file for file in files}


def slug(run: Run) -> str:
    """The run's folder below page/."""
    return run.name.replace("/", "-")


def stem(picture: Picture) -> str:
    return picture.file.stem if picture.step < 0 else f"{picture.step:06d}-{picture.file.stem}"


def _show(source: Path, folder: Path, name: str) -> bool:
    """The picture itself, as a hard link where that is possible, and a small one beside it; only what has changed.

    False for a file that is damaged, or gone in the meantime."""
    small = folder / f"{name}.webp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not _is_of(small, source):
            picture = open_picture(source)
            _link(source, folder / f"{name}.png")
            _thumbnail(picture, source, small)  # last, for it says that both are there
        return True
    except (InputError, FileNotFoundError):
        return False


def _link(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as beside:
        try:
            os.link(source, Path(beside) / target.name)
        except OSError:  # another disk, or a file system without links
            shutil.copy2(source, Path(beside) / target.name)
        (Path(beside) / target.name).replace(target)


def _show_training(source: Path, folder: Path, number: int) -> str | None:
    small = folder / f"{number}.webp"
    try:
        if not _is_of(small, source):
            _thumbnail(open_picture(source), source, small)
    except (InputError, OSError):  # damaged, or gone since it was trained on
        return None
    return small.name


def _is_of(small: Path, source: Path) -> bool:
    """Whether `small` was made of `source` as it is now: then it has its time."""
    return small.is_file() and small.stat().st_mtime_ns == source.stat().st_mtime_ns


def _thumbnail(picture: Image.Image, source: Path, path: Path) -> None:
    picture, written = picture.convert("RGB"), source.stat()
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)

    def save(file: Path) -> None:
        picture.save(file, quality=85, method=4)
        os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))

    write_atomically(path, save)


def html(data: dict[str, Any], sweep: Sweep, judged: Verdict) -> str:
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    texts = {name: (HERE / name).read_text(encoding="utf-8") for name in (*STYLES, *PROGRAM)}
    # "<" is written as an escape, so that a prompt with </script> in it stays a prompt
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = environment.get_template("template.html")
    return template.render(
        title=sweep.title,
        generator=OURS,
        words=words(),
        files=texts,
        styles=STYLES,
        program=PROGRAM,
        data=embedded,
        sentence=judged.sentence["en"],
    )


def page_data(sweep: Sweep, judged: Verdict, training: list[str]) -> dict[str, Any]:
    """What the page's program shows, as JSON: numbers of runs, prompts and steps instead of their texts."""
    prompts = list(dict.fromkeys(p.prompt for run in sweep.runs for p in run.pictures))
    rows, columns = axes(sweep)
    best = sweep.runs[judged.ranking[0]] if judged.ranking else None
    faults = {i: fault(sweep.runs[i], best, judged.measure) for i in judged.ranking}
    return {
        "title": sweep.title,
        "swept": sweep.swept,
        "prompts": prompts,
        "measure": judged.measure,
        "ranking": judged.ranking,
        "ties": judged.ties,
        "sentence": judged.sentence,
        "axes": {"rows": rows, "columns": columns},
        "training": training,
        "words": words(),
        "runs": [run_data(run, sweep, prompts) | {"fault": faults.get(i)} for i, run in enumerate(sweep.runs)],
    }


def run_data(run: Run, sweep: Sweep, prompts: list[str]) -> dict[str, Any]:
    steps = [step for step, _ in run.loss]
    trend = smoothed([loss for _, loss in run.loss], max(1, len(steps) // 50))
    each = max(1, -(-len(steps) // POINTS))
    return {
        "name": run.name,
        "folder": slug(run),
        "place": str(run.folder),
        "label": label(run, sweep),
        "status": run.status,
        "error": run.error,
        "settings": {key: run.settings.get(key) for key in sweep.swept},
        "step": run.step,
        "steps": run.settings.get("steps"),
        "seconds": run.seconds,
        "loss": last_loss(run),
        "validation_loss": validation_loss(run),
        "scores": {name: _rounded(score.value, score.low, score.high) for name, score in run.scores.items()},
        "before": {name: _rounded(score.value, score.low, score.high) for name, score in run.scores_before.items()},
        "curve": [steps[::-each][::-1], _rounded(*trend[::-each][::-1])],
        "validation": [[step for step, _ in run.validation_loss], _rounded(*(loss for _, loss in run.validation_loss))],
        # step, prompt, seed, and the file in page/FOLDER without its suffix
        "pictures": [[p.step, prompts.index(p.prompt), p.seed, stem(p)] for p in run.pictures],
        "commands": commands(run),
    }


def _rounded(*numbers: float) -> list[float]:
    return [float(f"{number:.5g}") for number in numbers]


def commands(run: Run) -> dict[str, str]:
    """To repeat the run, to go on training it, and to draw a photo with it: what exists of the three."""
    own = [o for o in run.overrides if not o.startswith(("resume=", "hydra.run.dir="))]
    folder, steps = str(run.folder), run.settings.get("steps") or 0
    said = {"repeat": own}
    if any((run.folder / "checkpoints").glob("step-*")):
        further = [f"steps={round(1.5 * steps)}"] if run.status == "done" else []
        said["go_on"] = [f"resume={folder}", *further]
    if run.status == "done":
        base = [f"model={run.settings['model']}"] if run.settings.get("model") != "tiny" else []
        base += [o for o in own if o.startswith("model.")]
        said["use"] = ["stage=img2img", *base, f"lora={folder}", f"trigger={run.settings.get('trigger')}",
                       "stage.photo=me.jpg"]  # fmt: skip
    return {name: shlex.join(["python", "-m", "lora_lab", *words]) for name, words in said.items()}


def sheet(sweep: Sweep, judged: Verdict, assets: Path) -> Image.Image:
    """Runs, the best first, against prompts: the pictures of each run's last step, and of the base."""
    ranked = list(judged.ranking) + [i for i in range(len(sweep.runs)) if i not in judged.ranking]
    runs = [sweep.runs[i] for i in ranked if sweep.runs[i].status != "missing"]
    prompts = list(dict.fromkeys(p.prompt for run in runs for p in run.pictures)) or [""]
    rows, titles = [], []
    base = {p.prompt: (run, p) for run in reversed(runs) for p in reversed(run.pictures) if p.step < 0}
    if base:
        rows.append([_small(assets, *base[text]) if text in base else None for text in prompts])
        titles.append(words()["base"]["en"])
    for run in runs[:SHEET_ROWS]:
        last = max((p.step for p in run.pictures), default=-1)
        drawn = {p.prompt: p for p in reversed(run.pictures) if p.step == last and last >= 0}  # of seeds the first
        rows.append([_small(assets, run, drawn[text]) if text in drawn else run.error for text in prompts])
        score = run.scores.get(judged.measure or "")
        titles.append(label(run, sweep) + (f"\n{score.value:.2f}" if score else ""))
    return contact_sheet(rows, prompts, titles, cell=192, title=sweep.title)


def _small(assets: Path, run: Run, picture: Picture) -> Image.Image:
    return Image.open(assets / slug(run) / f"{stem(picture)}.webp")
