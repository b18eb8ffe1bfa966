"""Write the comparison page: index.html, comparison.png and page/ with all images, a folder that can be moved."""

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

from lora_lab.board.curves import running_mean
from lora_lab.board.read import Picture, Sweep, TrainedRun, final_loss, final_validation_loss
from lora_lab.board.verdict import Verdict, axes, fault, label, words
from lora_lab.errors import InputError
from lora_lab.images.pixels import open_picture
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import write_atomically, write_text

HERE = Path(__file__).parent
STYLES, SCRIPTS = ("uplot.min.css", "page.css"), ("uplot.min.js", "page.js", "matrix.js", "zoom.js", "runs.js")
GENERATOR = '<meta name="generator" content="lora_lab">'  # an index.html without it was not written here
THUMBNAIL_SIZE = 256  # pixels, of the longer side
CURVE_POINTS = 200  # at most; a chart is not wide enough to show more
SHEET_ROWS = 24  # of comparison.png, for the best runs


def write_page(sweep: Sweep, verdict: Verdict, to: Path) -> Path:
    """Write the page of `sweep` into the folder `to`; returns index.html.

    Several processes may do so at a time: each file is written atomically, and the last writer wins. Raises InputError
    if `to` has an index.html that another program wrote."""
    page = to / "index.html"
    if page.is_file() and GENERATOR not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise InputError(f"{page} is not a comparison page: move it away, or name another folder with hydra.run.dir=")
    assets = to / "page"
    runs = [
        replace(run, pictures=tuple(p for p in run.pictures if _add_picture(p.file, assets / slug(run), stem(p))))
        for run in sweep.runs
    ]
    sweep = replace(sweep, runs=tuple(runs))
    names = (_add_training_image(file, assets / "training", i) for i, file in enumerate(sweep.training))
    training = [name for name in names if name]
    write_atomically(to / "comparison.png", sheet(sweep, verdict, assets).save)
    write_text(page, html(page_data(sweep, verdict, training), sweep, verdict))
    return page


def files_to_share(page: Path) -> dict[str, Path]:
    """The files of the page in the folder `page`, by their names in it, without the full-size images.

    Those are most of its size, and the page shows the thumbnails if they are missing."""
    files = [page / "index.html", page / "comparison.png", *sorted((page / "page").rglob("*.webp"))]
    return {file.relative_to(page).as_posix(): file for file in files}


def slug(run: TrainedRun) -> str:
    """The name of the run's folder below page/."""
    return run.name.replace("/", "-")


def stem(picture: Picture) -> str:
    """The name, without a suffix, of the picture's files in the run's folder below page/."""
    return picture.file.stem if picture.step < 0 else f"{picture.step:06d}-{picture.file.stem}"


def _add_picture(source: Path, folder: Path, name: str) -> bool:
    """Put the image, as a hard link if possible, and its thumbnail into `folder`, unless they are current.

    Returns False for a file that is damaged or was deleted."""
    small = folder / f"{name}.webp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if not _is_current(small, source):
            picture = open_picture(source)
            _link(source, folder / f"{name}.png")
            _write_thumbnail(picture, source, small)  # last, because a current thumbnail means that both are current
        return True
    except (InputError, FileNotFoundError):
        return False


def _link(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
        link = Path(folder) / target.name
        try:
            os.link(source, link)
        except OSError:  # another disk, or a file system without links
            shutil.copy2(source, link)
        link.replace(target)


def _add_training_image(source: Path, folder: Path, number: int) -> str | None:
    small = folder / f"{number}.webp"
    try:
        if not _is_current(small, source):
            _write_thumbnail(open_picture(source), source, small)
    except (InputError, OSError):  # damaged, or deleted since the training
        return None
    return small.name


def _is_current(small: Path, source: Path) -> bool:
    """Whether the thumbnail `small` is of the present `source`: then both have the same modification time."""
    return small.is_file() and small.stat().st_mtime_ns == source.stat().st_mtime_ns


def _write_thumbnail(picture: Image.Image, source: Path, path: Path) -> None:
    picture, written = picture.convert("RGB"), source.stat()
    picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)

    def save(file: Path) -> None:
        picture.save(file, quality=85, method=4)
        os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))

    write_atomically(path, save)


def html(data: dict[str, Any], sweep: Sweep, verdict: Verdict) -> str:
    """index.html, with `data` for its scripts, styles and scripts in one file."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    texts = {name: (HERE / name).read_text(encoding="utf-8") for name in (*STYLES, *SCRIPTS)}
    # "<" is escaped, so that a prompt that contains </script> does not end the script
    embedded = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = environment.get_template("template.html")
    return template.render(
        title=sweep.title,
        generator=GENERATOR,
        words=words(),
        files=texts,
        styles=STYLES,
        program=SCRIPTS,
        data=embedded,
        sentence=verdict.sentence["en"],
    )


def page_data(sweep: Sweep, verdict: Verdict, training: list[str]) -> dict[str, Any]:
    """The data of the page's scripts, as JSON; runs and prompts are referred to by their numbers."""
    prompts = list(dict.fromkeys(p.prompt for run in sweep.runs for p in run.pictures))
    rows, columns = axes(sweep)
    best = sweep.runs[verdict.ranking[0]] if verdict.ranking else None
    faults = {i: fault(sweep.runs[i], best, verdict.measure) for i in verdict.ranking}
    return {
        "title": sweep.title,
        "swept": sweep.swept,
        "prompts": prompts,
        "measure": verdict.measure,
        "ranking": verdict.ranking,
        "ties": verdict.ties,
        "sentence": verdict.sentence,
        "axes": {"rows": rows, "columns": columns},
        "training": training,
        "words": words(),
        "runs": [run_data(run, sweep, prompts) | {"fault": faults.get(i)} for i, run in enumerate(sweep.runs)],
    }


def run_data(run: TrainedRun, sweep: Sweep, prompts: list[str]) -> dict[str, Any]:
    """The part of `page_data` about one run."""
    steps = [step for step, _ in run.loss]
    trend = running_mean([loss for _, loss in run.loss], max(1, len(steps) // 50))
    stride = max(1, -(-len(steps) // CURVE_POINTS))
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
        "loss": final_loss(run),
        "validation_loss": final_validation_loss(run),
        "scores": {name: _rounded(score.value, score.low, score.high) for name, score in run.scores.items()},
        "before": {name: _rounded(score.value, score.low, score.high) for name, score in run.scores_before.items()},
        "curve": [steps[::-stride][::-1], _rounded(*trend[::-stride][::-1])],
        "validation": [[step for step, _ in run.validation_loss], _rounded(*(loss for _, loss in run.validation_loss))],
        # step, prompt, seed, and the file in page/FOLDER without its suffix
        "pictures": [[p.step, prompts.index(p.prompt), p.seed, stem(p)] for p in run.pictures],
        "commands": commands(run),
    }


def _rounded(*numbers: float) -> list[float]:
    return [float(f"{number:.5g}") for number in numbers]


def commands(run: TrainedRun) -> dict[str, str]:
    """The command lines that repeat the run, continue its training, and use its LoRA, as far as they apply."""
    overrides = [o for o in run.overrides if not o.startswith(("resume=", "hydra.run.dir="))]
    folder, steps = str(run.folder), run.settings.get("steps") or 0
    lines = {"repeat": overrides}
    if any((run.folder / "checkpoints").glob("step-*")):
        more_steps = [f"steps={round(1.5 * steps)}"] if run.status == "done" else []
        lines["go_on"] = [f"resume={folder}", *more_steps]
    if run.status == "done":
        base = [f"model={run.settings['model']}"] if run.settings.get("model") != "tiny" else []
        base += [o for o in overrides if o.startswith("model.")]
        lines["use"] = ["stage=img2img", *base, f"lora={folder}", f"trigger={run.settings.get('trigger')}",
                        "stage.photo=me.jpg"]  # fmt: skip
    return {name: shlex.join(["python", "-m", "lora_lab", *line]) for name, line in lines.items()}


def sheet(sweep: Sweep, verdict: Verdict, assets: Path) -> Image.Image:
    """comparison.png: a row for each run, the best first, and one for the base model; a column for each prompt.

    The images are those of the last step."""
    ranked = list(verdict.ranking) + [i for i in range(len(sweep.runs)) if i not in verdict.ranking]
    runs = [sweep.runs[i] for i in ranked if sweep.runs[i].status != "missing"]
    prompts = list(dict.fromkeys(p.prompt for run in runs for p in run.pictures)) or [""]
    rows, titles = [], []
    base = {p.prompt: (run, p) for run in reversed(runs) for p in reversed(run.pictures) if p.step < 0}
    if base:
        rows.append([_small(assets, *base[text]) if text in base else None for text in prompts])
        titles.append(words()["base"]["en"])
    for run in runs[:SHEET_ROWS]:
        last = max((p.step for p in run.pictures), default=-1)
        shown = {p.prompt: p for p in reversed(run.pictures) if p.step == last and last >= 0}  # of the first seed
        rows.append([_small(assets, run, shown[text]) if text in shown else run.error for text in prompts])
        score = run.scores.get(verdict.measure or "")
        titles.append(label(run, sweep) + (f"\n{score.value:.2f}" if score else ""))
    return contact_sheet(rows, prompts, titles, cell=192, title=sweep.title)


def _small(assets: Path, run: TrainedRun, picture: Picture) -> Image.Image:
    return Image.open(assets / slug(run) / f"{stem(picture)}.webp")
