"""The comparison page: index.html, comparison.png and page/ with all images, a folder that can be moved.

The page says in one sentence which run is the best. That of a sweep is rewritten after each job, and logged to the
tracker at the end."""

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import compress
from pathlib import Path
from typing import Any

from filelock import FileLock
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from lora_lab.board.read import (
    Picture,
    Sweep,
    TrainedRun,
    final_loss,
    final_validation_loss,
    read_sweep,
    running_mean,
    triggers_in,
)
from lora_lab.board.record import is_number
from lora_lab.console import warn
from lora_lab.errors import InputError
from lora_lab.images.pixels import open_picture
from lora_lab.images.scan import leads_out
from lora_lab.images.sheet import contact_sheet
from lora_lab.runs import display_path, write_atomically, write_text
from lora_lab.settings.schema import Tracker

LANGUAGES = ("en", "ko")
HERE = Path(__file__).parent
STYLES, SCRIPTS = ("uplot.min.css", "page.css"), ("uplot.min.js", "page.js", "matrix.js", "zoom.js", "runs.js")
GENERATOR = '<meta name="generator" content="lora_lab">'  # an index.html without it was not written here
THUMBNAIL_SIZE = 256  # pixels, of the longer side; an image of at most that size is its own thumbnail
MEASURES = ("score", "resemblance")  # the runs are ranked by the first that there is
CURVE_POINTS = 200  # at most; a chart is not wide enough to show more
SHEET_ROWS = 24  # of comparison.png, for the best runs
LOCK = ".page.lock"  # in the sweep's folder: one process at a time writes the page


def rewrite_page(sweep: Path) -> Path | None:
    """Write the page of `sweep` from the files that are there, and return it; None if it has no runs to compare, or it
    failed.

    Of several processes each waits for the others, so the last one to write has read what all of them left. An error is
    one line on stderr, and never ends a job."""
    sweep = display_path(sweep)  # the page's commands name folders relative to the working directory
    if not sweep.is_dir():  # no job was started
        return None
    try:
        with FileLock(sweep / LOCK, timeout=60):
            content = read_sweep([sweep])
            return write_page(content, verdict(content), sweep) if content.runs else None
    except InputError as error:
        warn(str(error))
    except Exception as error:
        warn(f"the comparison page of {sweep} could not be written ({error!r})")
    return None


def attach_page(sweep: Path, tracker: Tracker) -> None:
    """Log the page of the finished `sweep` to W&B, unless the same page was logged before.

    An error is one line on stderr."""
    from lora_lab.track import wandb

    try:
        wandb.attach(sweep, files_to_share(sweep), tracker)
    except Exception as error:
        warn(f"the comparison page of {display_path(sweep)} could not be logged ({error!r})")


@dataclass(frozen=True)
class Verdict:
    """The ranking of the runs of a sweep, which are referred to by their numbers."""

    measure: str | None  # the name of a score, validation_loss, or None if there is neither
    ranking: tuple[int, ...]  # the done runs that have the measure, the best first
    ties: tuple[int, ...]  # those within the interval of the best
    sentence: Mapping[str, str]  # language -> which run is the best, and why


def word(key: str, sweep: Sweep) -> Mapping[str, str]:
    """A text of the page by language; that of drawn photos, or of captions, has a key of its own where it differs."""
    suffix = "_drawn" if sweep.drawn else "_captioned" if sweep.captioned else ""
    return words().get(f"{key}{suffix}") or words()[key]


@cache
def words() -> dict[str, dict[str, str]]:
    """All texts of the page: key -> language -> text."""
    return json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))


def verdict(sweep: Sweep) -> Verdict:
    """Rank the runs by the combined score, or by the validation loss if no run has scores.

    A run is tied with the best one if its score lies within the interval of the best score."""
    done = [(i, run) for i, run in enumerate(sweep.runs) if run.status == "done"]
    names = dict.fromkeys(name for _, run in done for name in run.scores)
    if names:
        measure = next((name for name in MEASURES if name in names), next(iter(names)))
        scored = {i: run.scores[measure] for i, run in done if measure in run.scores}
        ranking = tuple(sorted(scored, key=lambda i: -scored[i].value))
        ties = tuple(i for i in ranking[1:] if scored[i].value >= scored[ranking[0]].low)
    else:
        losses = {i: loss for i, run in done if (loss := final_validation_loss(run)) is not None}
        measure = "validation_loss" if losses else None
        ranking, ties = tuple(sorted(losses, key=losses.__getitem__)), ()
    sentence = {language: " ".join(_reasons(sweep, measure, ranking, ties, language)) for language in LANGUAGES}
    return Verdict(measure, ranking, ties, sentence)


def _reasons(
    sweep: Sweep, measure: str | None, ranking: tuple[int, ...], ties: tuple[int, ...], language: str
) -> Iterator[str]:
    def say(key: str, **values: Any) -> str:
        return word(key, sweep)[language].format(**values)

    if not ranking:
        yield say("look" if any(run.status == "done" for run in sweep.runs) else "none_done")
        return
    best = sweep.runs[ranking[0]]
    if measure == "validation_loss":
        yield say("best_loss", run=label(best, sweep), value=f"{final_validation_loss(best):.4f}")
        return
    score, base_score = best.scores[measure], best.scores_before.get(measure)
    value, low, high = (f"{number:.2f}" for number in (score.value, score.low, score.high))
    interval = "best_score" if score.low < score.high else "best_score_alone"
    name = words()[measure][language] if measure in words() else measure
    yield say(interval, run=label(best, sweep), measure=name, value=value, low=low, high=high)
    if base_score and base_score.value >= score.value:
        yield say("no_better_than_base", value=f"{base_score.value:.2f}")
    if len(ties) == 1:
        yield say(
            "tie", run=label(sweep.runs[ties[0]], sweep), value=f"{sweep.runs[ties[0]].scores[measure].value:.2f}"
        )
    elif ties:
        format_value = " / ".join(label(sweep.runs[i], sweep) for i in ties[:3]) + (" …" if len(ties) > 3 else "")
        yield say("ties", runs=format_value, number=len(ties))
    elif len(ranking) > 1 and score.low < score.high:
        yield say("clear")


def resemblances(sweep: Sweep) -> dict[int, tuple[float, float]]:
    """`kept` and `character` of the done runs that have both."""
    scores = {i: run.scores for i, run in enumerate(sweep.runs) if run.status == "done"}
    both = {i: each for i, each in scores.items() if "kept" in each and "character" in each}
    return {i: (each["kept"].value, each["character"].value) for i, each in both.items()}


def frontier(points: Mapping[int, tuple[float, float]]) -> tuple[int, ...]:
    """The Pareto frontier of `points`, by the first number: no other point is as high in both and higher in one."""
    found: list[int] = []
    highest = -math.inf
    for i in sorted(points, key=points.__getitem__, reverse=True):
        if points[i][1] > highest or (found and points[i] == points[found[-1]]):
            found.append(i)
            highest = points[i][1]
    return tuple(reversed(found))


def fault(run: TrainedRun, best: TrainedRun, measure: str | None) -> str | None:
    """Why a run has less than half of the best run's score; None if it has more, or was not measured.

    `broken`: its prompt contrast is less than half of the base model's. `little`: it learned too little."""
    contrast, base_contrast = run.scores.get("contrast"), run.scores_before.get("contrast")
    if measure not in run.scores or not contrast or not base_contrast:
        return None
    if run.scores[measure].value >= best.scores[measure].value / 2:
        return None
    return "broken" if contrast.value < base_contrast.value / 2 else "little"


def label(run: TrainedRun, sweep: Sweep) -> str:
    """The values of the run for the swept keys: `lr 0.001, rank 16`; without such keys its name."""
    values = [f"{key} {format_value(run.settings.get(key))}" for key in sweep.swept]
    return ", ".join(values) or run.name


def format_value(value: object) -> str:
    """`value` as text; a float as one types it, 1e-5 instead of 1e-05."""
    if not isinstance(value, float):
        return str(value)
    return re.sub(r"e(-?)\+?0*", r"e\1", f"{value:.6g}")


def axes(sweep: Sweep) -> tuple[str, str]:
    """What the rows and the columns of the matrix show at first: `@run`, `@prompt`, `@step`, or a swept key.

    Two swept keys are the axes if more than half of their combinations have runs. One key has the prompts as the other
    axis. Photos are the rows, and the runs that drew them the columns."""
    keys = sorted(sweep.swept, key=lambda key: key == "lr")  # the learning rate is the columns
    if sweep.drawn:  # the rows are photos
        return "@prompt", keys[0] if len(keys) == 1 else "@run"
    if len(sweep.runs) == 1:
        return "@step", "@prompt"
    if len(keys) == 1:
        return keys[0], "@prompt"
    if len(keys) == 2 and len(sweep.runs) > len(sweep.swept[keys[0]]) * len(sweep.swept[keys[1]]) / 2:
        return keys[0], keys[1]
    return "@run", "@prompt"


def write_page(sweep: Sweep, verdict: Verdict, to: Path) -> Path:
    """Write the page of `sweep` into the folder `to`; returns index.html.

    Several processes may do so at a time: each file is written atomically, and the last writer wins. Raises InputError
    if `to` has an index.html that another program wrote."""
    page = to / "index.html"
    if page.is_file() and GENERATOR not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise InputError(f"{page} is not a comparison page: move it away, or name another folder with hydra.run.dir=")
    assets = to / "page"
    if sweep.captioned:
        from lora_lab.board.captions import html as caption_html

        return write_text(page, caption_html(sweep, verdict.sentence, assets))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sweep = replace(sweep, runs=tuple(_add_pictures(run, assets / slug(run), pool) for run in sweep.runs))
    names = (add_thumbnail(file, assets / "training", i) for i, file in enumerate(sweep.training))
    training = [name for name in names if name] or _training_thumbnails(assets / "training")
    write_atomically(to / "comparison.png", sheet(sweep, verdict, assets).save)
    content = html(page_data(sweep, verdict, training, assets), sweep, verdict)
    write_text(page, content.encode("utf-8", "replace").decode())  # a JSON string may have half a character
    return page


def files_to_share(page: Path) -> dict[str, Path]:
    """The files of the page in the folder `page`, by their names in it, without the full-size images.

    Those are most of its size, and the page shows the thumbnails if they are missing."""
    assets = page / "page"
    own = (file for file in assets.rglob("*.png") if _thumbnail(file) == file)
    files = [page / "index.html", page / "comparison.png", *sorted([*assets.rglob("*.webp"), *own])]
    return {file.relative_to(page).as_posix(): file for file in files}


def slug(run: TrainedRun) -> str:
    """The name of the run's folder below page/."""
    return run.name.replace("/", "-")


def stem(picture: Picture) -> str:
    """The name, without a suffix, of the picture's files in the run's folder below page/."""
    return picture.file.stem if picture.step < 0 else f"{picture.step:06d}-{picture.file.stem}"


def _add_pictures(run: TrainedRun, folder: Path, pool: Executor) -> TrainedRun:
    """Put the images of `run` into `folder`; returns the run without those that are damaged or were deleted."""
    _create(folder)
    added = pool.map(lambda picture: _add_picture(picture.file, folder, stem(picture)), run.pictures)
    return replace(run, pictures=tuple(compress(run.pictures, added)))


def _add_picture(source: Path, folder: Path, name: str) -> bool:
    """Put the image, as a hard link if possible, and its thumbnail into `folder`, unless they are current.

    Of a small image there is no thumbnail: to create a hundred thousand files takes longer than to draw them.
    Returns False for a file that is damaged or was deleted."""
    whole, small = folder / f"{name}.png", folder / f"{name}.webp"
    try:
        if not _is_current(whole, source) or (small.is_file() and not _is_current(small, source)):
            picture = open_picture(source)
            if max(picture.size) > THUMBNAIL_SIZE:
                _write_thumbnail(picture, source, small)
            else:
                small.unlink(missing_ok=True)  # of an older, larger image
            _link(source, whole)  # last, because a current image means that both are current
        return True
    except (InputError, FileNotFoundError):
        return False


def _thumbnail(whole: Path) -> Path:
    """The file that the page shows in place of the image `whole` of a run."""
    small = whole.with_suffix(".webp")
    return small if small.is_file() else whole


def _training_thumbnails(folder: Path) -> list[str]:
    """The files of an earlier page."""
    return sorted(file.name for file in folder.glob("*.webp") if not leads_out(file, folder.parent))


def _create(folder: Path) -> None:
    """Create a folder of the page. Raises InputError for a link, which would lead out of the page of a stranger."""
    if folder.is_symlink() or folder.parent.is_symlink():
        raise InputError(f"{folder}: a link, not a folder of a comparison page: remove it")
    folder.mkdir(parents=True, exist_ok=True)


def _link(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)  # an older image
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        write_atomically(target, partial(shutil.copy2, source))


def add_thumbnail(source: Path, folder: Path, number: int) -> str | None:
    """Put the thumbnail of an image of the dataset into `folder`, unless it is current; returns its name, None for an
    image that is damaged or was deleted. Raises InputError for a link in the place of the folder."""
    small = folder / f"{number}.webp"
    _create(folder)
    try:
        if not _is_current(small, source):
            _write_thumbnail(open_picture(source), source, small)
    except (InputError, OSError):  # damaged, or deleted since the training
        return None
    return small.name


def _is_current(file: Path, source: Path) -> bool:
    """Whether `file` was made of the present `source`: then both have the same modification time."""
    return file.is_file() and not file.is_symlink() and file.stat().st_mtime_ns == source.stat().st_mtime_ns


def _write_thumbnail(picture: Image.Image, source: Path, path: Path) -> None:
    """Write it in place, for there may be a hundred thousand: the last act makes it current."""
    picture, written = picture.convert("RGB"), source.stat()
    picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    path.unlink(missing_ok=True)  # a link, which would lead out
    picture.save(path, quality=85, method=2)  # half the time of method 4, files 5 % larger
    os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))


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


def page_data(sweep: Sweep, verdict: Verdict, training: list[str], assets: Path) -> dict[str, Any]:
    """The data of the page's scripts, as JSON; runs and prompts are referred to by their numbers. The images lie in
    the folder `assets`."""
    prompts = list(dict.fromkeys(p.prompt for run in sweep.runs for p in run.pictures))
    rows, columns = axes(sweep)
    best = sweep.runs[verdict.ranking[0]] if verdict.ranking else None
    points = resemblances(sweep)
    faults = {i: fault(sweep.runs[i], best, verdict.measure) for i in verdict.ranking}
    return {
        "title": sweep.title,
        "swept": sweep.swept,
        "prompts": prompts,
        "drawn": sweep.drawn,
        "measure": verdict.measure,
        "ranking": verdict.ranking,
        "ties": verdict.ties,
        "sentence": verdict.sentence,
        "points": sorted(points, key=points.__getitem__) if len(points) > 1 else [],
        "frontier": frontier(points),
        "axes": {"rows": rows, "columns": columns},
        "training": training,
        "words": words(),
        "runs": [run_data(run, sweep, prompts, assets) | {"fault": faults.get(i)} for i, run in enumerate(sweep.runs)],
    }


def run_data(run: TrainedRun, sweep: Sweep, prompts: list[str], assets: Path) -> dict[str, Any]:
    """The part of `page_data` about one run."""
    folder = assets / slug(run)
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
        # step, prompt, seed, the file in page/FOLDER without its suffix, the suffix of its thumbnail, and what is known
        # of an image of stage=img2img
        "pictures": [
            [p.step, prompts.index(p.prompt), p.seed, stem(p), _thumbnail(folder / f"{stem(p)}.png").suffix[1:]]
            + [p.details] * bool(p.details)
            for p in run.pictures
        ],
        "commands": commands(run, sweep.drawn),
    }


def _rounded(*numbers: float) -> list[float]:
    return [float(f"{number:.5g}") for number in numbers]


def commands(run: TrainedRun, drawn: bool = False) -> dict[str, str]:
    """The command lines that repeat the run, continue its training, and use its LoRA, as far as they apply; of a run
    that has `drawn` photos, that which draws others."""
    overrides = [o for o in run.overrides if not o.startswith(("resume=", "hydra.run.dir="))]
    folder, steps = str(run.folder), run.settings.get("steps")
    lines = {"repeat": overrides}
    if any((run.folder / "checkpoints").glob("step-*")):
        more_steps = [f"steps={round(1.5 * steps)}"] if run.status == "done" and is_number(steps) else []
        lines["go_on"] = [f"resume={folder}", *more_steps]
    if drawn:
        lines["use"] = [*(o for o in overrides if not o.startswith("stage.photo=")), "stage.photo=me.jpg"]
    elif run.status == "done":
        model = run.settings.get("model", "tiny")
        base = [f"model={model}"] if model != "tiny" else []
        base += [o for o in overrides if o.startswith("model.")]
        lines["use"] = ["stage=img2img", *base, f"lora={folder}", f"trigger={(triggers_in(run.settings) or [None])[0]}",
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
        titles.append(word("base", sweep)["en"])
    for run in runs[:SHEET_ROWS]:
        last = max((p.step for p in run.pictures), default=-1)
        shown = {p.prompt: p for p in reversed(run.pictures) if p.step == last and last >= 0}  # of the first seed
        rows.append([_small(assets, run, shown[text]) if text in shown else run.error for text in prompts])
        score = run.scores.get(verdict.measure or "")
        titles.append(label(run, sweep) + (f"\n{score.value:.2f}" if score else ""))
    return contact_sheet(rows, prompts, titles, cell=192, title=sweep.title)


def _small(assets: Path, run: TrainedRun, picture: Picture) -> Image.Image:
    return Image.open(_thumbnail(assets / slug(run) / f"{stem(picture)}.png"))
