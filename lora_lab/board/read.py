"""Read a sweep, or several run folders, from their files; logs are not parsed. Draw the loss curve of a run."""

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_lab.base.locate import locate_folder
from lora_lab.board.record import is_number, json_values, own_file, read_json, read_object, recorded_settings
from lora_lab.captions.files import PROPOSED
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.images.scan import leads_out, natural_key, pictures
from lora_lab.runs import SWEEP_RECORD, write_atomically
from lora_lab.settings.schema import Triggers, shown_on_page

# The stages whose runs are compared, not with each other.
TRAINING, DRAWING, CAPTIONING = ("train", "pipeline"), ("img2img",), ("caption",)
IMAGE_NAME, STEP_NAME = re.compile(r"p(\d+)-s(\d+)\.png"), re.compile(r"step-(\d+)")
DRAWING_NAME = re.compile(r"(.+)-s\d+.*\.png")  # of stage=img2img: the photo's name and the seed
LONGEST = 2000  # characters of an error that the page shows
TRAINING_IMAGES = 4  # of the dataset, which the page shows beside the best run


@dataclass(frozen=True)
class ScoreInterval:
    """A score with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Picture:
    """A validation image of a training; or an image of stage=img2img, whose photo takes the place of the prompt."""

    file: Path
    step: int  # -1: drawn by the base model without the LoRA; or the photo itself
    prompt: str  # with the trigger; or the photo's path
    seed: int
    details: dict[str, Any] = field(default_factory=dict)  # of stage=img2img: caption, prompt, weight, scores, ...


@dataclass(frozen=True)
class TrainedRun:
    """A run of the comparison."""

    name: str  # its folder, relative to the folder that is compared
    folder: Path
    status: str  # done, failed, unfinished (running or stopped), missing (not started)
    error: str | None  # why a run failed, or which of its files are damaged, one sentence for each
    overrides: tuple[str, ...]
    settings: dict[str, Any]  # dotted key -> value, and group -> option
    step: int = 0  # the last step with a metric
    seconds: float | None = None
    scores: dict[str, ScoreInterval] = field(default_factory=dict)
    scores_before: dict[str, ScoreInterval] = field(default_factory=dict)  # of the base model without the LoRA
    loss: tuple[tuple[int, float], ...] = ()  # (step, loss)
    validation_loss: tuple[tuple[int, float], ...] = ()
    pictures: tuple[Picture, ...] = ()
    captions: dict[str, str] = field(default_factory=dict)  # of stage=caption, by the names of the images
    rate: float | None = None  # of stage=caption: images per second
    damage: tuple[str, ...] = ()  # files that could not be read, one sentence for each


@dataclass(frozen=True)
class Sweep:
    """The runs of a comparison page."""

    title: str
    runs: tuple[TrainedRun, ...]
    swept: dict[str, list[Any]]  # a key in which runs differ -> its values, in order
    training: tuple[Path, ...]  # a few of the training images
    drawn: bool = False  # the runs are those of stage=img2img, and the pictures' prompts the names of photos
    captioned: bool = False  # the runs are those of stage=caption
    images: dict[str, dict[str, Path]] = field(default_factory=dict)  # that they captioned, by dataset.root and name


def read_sweep(folders: Sequence[Path], datasets: Sequence[Path] | None = None) -> Sweep:
    """All training runs below `folders`, each a sweep, a run or a parent of some, or else those that drew photos, or
    else those that wrote captions; possibly none.

    The page shows images of `datasets`, or inside `folders`, alone: a record may name any folder. None stands for all,
    where this process made the record."""
    run_paths = list({run.resolve(): run for folder in folders for run in run_folders(folder)}.values())
    parent = os.path.commonpath([f.resolve().parent if f in run_paths else f.resolve() for f in folders])
    runs = [_read_run(folder, folder.resolve().relative_to(parent).as_posix()) for folder in run_paths]
    runs += [run for folder in folders for run in _missing_runs(folder, runs)]
    stages = (TRAINING, DRAWING, CAPTIONING)
    trained, drawn, captioned = ([run for run in runs if _stage(run.settings) in kinds] for kinds in stages)
    runs = trained or _with_names_of_files(drawn) or captioned
    sweep = folders[0].resolve() if len(folders) == 1 else None
    title = " ".join(sweep.parts[-2:]) if sweep and (sweep / SWEEP_RECORD).is_file() else (sweep or Path()).name
    shown = None if datasets is None else [*datasets, *folders]
    only_drawn, only_captioned = not trained and bool(drawn), not trained and not drawn and bool(captioned)
    swept, training = _swept_keys(runs, only_drawn), _training_images(trained, shown) if trained else ()
    images = {root: _images(root, shown) for root in map(dataset_root, runs if only_captioned else ())}
    return Sweep(title, tuple(runs), swept, training, only_drawn, only_captioned, images)


def _stage(settings: dict[str, Any]) -> object:
    return settings.get("stage", "train")


def run_folders(folder: Path, depth: int = 4) -> list[Path]:
    """The run folders in `folder`, in natural order; folders inside a run are skipped."""
    if (folder / ".hydra").is_dir():
        return [folder]
    if depth == 0 or not folder.is_dir():
        return []
    inner = sorted((f for f in folder.iterdir() if f.is_dir()), key=lambda f: natural_key(f.name))
    return [run for f in inner for run in run_folders(f, depth - 1)]


def _read_run(folder: Path, name: str) -> TrainedRun:
    damage: list[str] = []

    def read(function: Callable[..., Any], default: Any, *arguments: object) -> Any:
        try:
            return function(folder, *arguments)
        except InputError as error:
            damage.append(str(error))
            return default

    settings, overrides = read(recorded_settings, ({}, []))
    result, failure = read(read_object, {}, "result.json"), read(read_object, {}, "failed.json")
    metrics, validation = read(_curve, (), "metrics.jsonl"), read(_curve, (), "validation.jsonl")
    draws = _stage(settings) in DRAWING
    captions = read(_captions, {}, result) if _stage(settings) in CAPTIONING else {}
    pictures = tuple(read(_drawings, (), settings) if draws else _pictures(folder, settings))
    errors = [str(failure.get("error", ""))[:LONGEST]] if failure else []
    return TrainedRun(
        name=name,
        folder=folder,
        status="failed" if failure else "done" if result else "unfinished",
        error="; ".join([*errors, *damage]) or None,
        overrides=tuple(overrides),
        settings=settings,
        step=metrics[-1][0] if metrics else 0,
        seconds=result["seconds"] if is_number(result.get("seconds")) else None,
        scores=_all_scores(result) or _means(pictures if result and draws else ()),
        scores_before=_scores(result.get("scores_before")),
        loss=metrics,
        validation_loss=validation,
        pictures=pictures,
        captions=captions,
        rate=rate if is_number(rate := result.get("pictures_per_second")) else None,
        damage=tuple(damage),
    )


def _missing_runs(folder: Path, runs: list[TrainedRun]) -> list[TrainedRun]:
    """The jobs in points.json of the sweep in `folder` that have no run yet."""
    overrides_of_runs, folders = [{*run.overrides} for run in runs], {run.folder for run in runs}
    common = next((run.settings for run in runs if run.settings), {})  # for keys that no override sets
    missing = []
    for number, overrides, values in _read_points(folder):
        job = folder / str(number)
        if job not in folders and not any({*overrides} <= known for known in overrides_of_runs):
            missing.append(TrainedRun(f"({number})", job, "missing", None, tuple(overrides), common | values))
    return missing


def _read_points(sweep: Path) -> list[tuple[int, list[str], dict[str, Any]]]:
    """Number, overrides and values of each job; none without a sweep, or for one that searches."""
    try:
        points = read_json(sweep, "points.json", [])
        return [(int(p["number"]), [str(o) for o in p["overrides"]], json_values(p["values"])) for p in points]
    except (InputError, TypeError, KeyError, ValueError, AttributeError) as error:
        say(f"{sweep / 'points.json'} is damaged, so jobs that were not started are left out ({error!r:.200})")
        return []


def _all_scores(result: dict[str, Any]) -> dict[str, ScoreInterval]:
    """Those in `scores` of a result.json, and then those beside it, such as `kept` and `character` of photos."""
    scores = result.get("scores")
    scores = scores if isinstance(scores, dict) else {}
    return _scores({**scores, **result, **scores})


def _scores(content: object) -> dict[str, ScoreInterval]:
    scores = {}
    for name, score in content.items() if isinstance(content, dict) else ():
        if isinstance(score, dict) and is_number(score.get("value")):
            low, high = (score[end] if is_number(score.get(end)) else score["value"] for end in ("low", "high"))
            scores[name] = ScoreInterval(score["value"], low, high)
    return scores


def _curve(folder: Path, name: str) -> tuple[tuple[int, float], ...]:
    """(step, loss) of each line; none if there is no such file. Raises InputError."""
    lines = _lines(folder, name)
    try:
        pairs = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        return tuple((int(step), loss) for step, loss in pairs if is_number(loss))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"{folder / name} is damaged: {error!r:.200}") from error


def _lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects; none if there is no such file. Raises InputError."""
    if not (folder / name).exists():
        return []
    file = own_file(folder, name)
    try:
        return [{**line} for line in read_metrics(file)]
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error!r:.200}") from error


def _pictures(run: Path, settings: dict[str, Any]) -> Iterable[Picture]:
    """The validation images in the folder of the run, without links that lead out of it."""
    stage = "stage.train." if settings.get("stage") == "pipeline" else "stage."
    prompts = settings.get(f"{stage}prompts")
    prompts = _filled(prompts if isinstance(prompts, list) else [], settings)
    for folder in (run / "samples" / "base", *sorted((run / "samples").glob("step-*"))):
        match = STEP_NAME.fullmatch(folder.name)
        if not (match or folder.name == "base") or leads_out(folder, run):
            continue
        step = int(match[1]) if match else -1
        for file in sorted(folder.glob("p*-s*.png"), key=lambda f: natural_key(f.name)):
            name = IMAGE_NAME.fullmatch(file.name)
            if name and (not file.is_symlink() or not leads_out(file, run)):
                number, seed = map(int, name.groups())
                yield Picture(file, step, prompts[number] if number < len(prompts) else f"p{number}", seed)


def triggers_in(settings: dict[str, Any]) -> list[str]:
    """The triggers of the characters; [] where the settings have none."""
    own = [value for key, value in settings.items() if key == "trigger" or key.startswith("trigger.")]
    return list(dict.fromkeys(map(str, own)))


def _filled(prompts: Sequence[Any], settings: dict[str, Any]) -> list[str]:
    """The prompts as training fills them, each once for each character."""
    by_folder = {str(i): trigger for i, trigger in enumerate(triggers_in(settings) or [""])}
    return Triggers(by_folder).fill(map(str, prompts))


def _drawings(run: Path, settings: dict[str, Any]) -> list[Picture]:
    """The photos and the images of the lines in prompts.jsonl, without links that lead out of the run.

    Raises InputError."""
    known = {"strength": settings.get("stage.strength"), "lora_weight": settings.get("stage.lora_weight")}
    files = {file.relative_to(run).as_posix(): file for file in (*run.glob("*.png"), *run.glob("photos/*.png"))}
    files = {name: file for name, file in files.items() if not leads_out(file, run)}
    photos, drawn = {}, []
    for line in _lines(run, "prompts.jsonl"):
        photo, seed, name = line.get("photo"), line.get("seed"), Path(str(line.get("picture"))).name
        match = DRAWING_NAME.fullmatch(name)
        if not (match and name in files and isinstance(photo, str) and isinstance(seed, int)):
            continue
        photo, whole = photo.encode("utf-8", "replace").decode(), f"photos/{match[1]}.png"
        if whole in files:
            photos.setdefault(photo, Picture(files[whole], -1, photo, seed))
        texts = {key: str(line[key])[:LONGEST] for key in ("caption", "prompt") if line.get(key) is not None}
        numbers = {key: line.get(key, value) for key, value in known.items()}
        scores = line.get("scores")
        scores = {str(k): v for k, v in scores.items() if is_number(v)} if isinstance(scores, dict) else {}
        details = {**texts, **{k: v for k, v in numbers.items() if is_number(v)}, "scores": scores}
        drawn.append(Picture(files[name], 0, photo, seed, details))
    return [*photos.values(), *drawn]


def _means(pictures: Sequence[Picture]) -> dict[str, ScoreInterval]:
    """The mean of every score over the pictures that have it."""
    values: dict[str, list[float]] = {}
    for picture in pictures:
        for name, value in picture.details.get("scores", {}).items():
            values.setdefault(name, []).append(value)
    return {name: ScoreInterval(*3 * [statistics.mean(each)]) for name, each in values.items()}


def _with_names_of_files(runs: list[TrainedRun]) -> list[TrainedRun]:
    """`runs` with names in place of the paths of photos and of the LoRA: the end of each path that no other has."""
    photos = _names([picture.prompt for run in runs for picture in run.pictures])
    loras = _names([lora for run in runs if isinstance(lora := run.settings.get("lora"), str)])
    return [
        replace(
            run,
            settings={k: loras[v] if k == "lora" and v in loras else v for k, v in run.settings.items()},
            pictures=tuple(replace(picture, prompt=photos[picture.prompt]) for picture in run.pictures),
        )
        for run in runs
    ]


def _names(paths: Sequence[str]) -> dict[str, str]:
    """By path the fewest of its last parts that tell it from the others."""
    parts = {path: Path(path).parts for path in paths}

    def name(path: str) -> str:
        others = [other for key, other in parts.items() if key != path]
        counts = range(1, len(parts[path]))
        count = next((n for n in counts if all(other[-n:] != parts[path][-n:] for other in others)), None)
        return "/".join(parts[path][-count:]) if count else path

    return {path: name(path) for path in parts}


def _swept_keys(runs: list[TrainedRun], drawn: bool) -> dict[str, list[Any]]:
    """The keys that overrides set and in which the runs differ, with their values in order."""
    keys = dict.fromkeys(o.partition("=")[0].lstrip("+") for run in runs for o in run.overrides)
    values_by_key = {}
    for key in keys:
        values = list({str(v): v for v in (run.settings.get(key) for run in runs if run.settings)}.values())
        if len(values) > 1 and shown_on_page(key, drawn):
            values_by_key[key] = sorted(values) if all(is_number(v) for v in values) else values
    return values_by_key


def _training_images(runs: list[TrainedRun], shown: Sequence[Path] | None) -> tuple[Path, ...]:
    """A few images of the dataset that the runs trained on."""
    root = next((dataset_root(run) for run in runs if run.settings), "")
    files = list(_images(root, shown).values())
    last = TRAINING_IMAGES - 1
    evenly_spaced = [round(i * (len(files) - 1) / last) for i in range(TRAINING_IMAGES)] if files else []
    return tuple(files[i] for i in dict.fromkeys(evenly_spaced))


def dataset_root(run: TrainedRun) -> str:
    """The dataset folder of a run, the first of several, as its record names it; "" without one."""
    root = run.settings.get("dataset.root")
    root = root[0] if isinstance(root, list) and root else root
    root = root.get("root") if isinstance(root, dict) else root
    return root if isinstance(root, str) else ""


def _images(root: str, shown: Sequence[Path] | None) -> dict[str, Path]:
    """The images of a dataset by their names, if it still exists, and lies in a folder of `shown`."""
    try:
        folder = locate_folder("dataset.root", root or None)
        if shown is not None and all(leads_out(folder, allowed) for allowed in shown):
            say(f"images of the dataset are not shown: add dataset.root={root} if you know that folder")
            return {}
        return pictures(folder)
    except (InputError, OSError, ValueError):
        return {}


def _captions(run: Path, result: dict[str, Any]) -> dict[str, str]:
    """The captions that a run of stage=caption wrote, or has proposed so far, by the names of the images.

    Raises InputError."""
    captions = result.get("captions")
    if not isinstance(captions, dict):
        captions = {line.get("file_name"): line.get("text") for line in _lines(run, PROPOSED)}
    return {n: text[:LONGEST] for n, text in captions.items() if isinstance(n, str) and isinstance(text, str)}


def final_validation_loss(run: TrainedRun) -> float | None:
    """The last validation loss, which is that of the finished LoRA; None if none was measured."""
    return run.validation_loss[-1][1] if run.validation_loss else None


def final_loss(run: TrainedRun) -> float | None:
    """The mean training loss of the last 50 steps, as in result.json; None without metrics."""
    return statistics.mean(loss for _, loss in run.loss[-50:]) if run.loss else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one dict for each step, without a last line that is incomplete because the run died.

    Raises OSError if there is no such file, JSONDecodeError if another line is damaged."""
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    metrics = [json.loads(line) for line in lines if line.strip()]
    try:
        return [*metrics, json.loads(last)]
    except json.JSONDecodeError:  # incomplete, or empty because the file ends with a newline
        return metrics


def running_mean(values: Sequence[float], halflife: float) -> list[float]:
    """Exponential running mean, m[t] = sum_i w^(t-i) x[i] / sum_i w^(t-i) with w = 2^(-1/halflife).

    `halflife` is the number of values after which a weight has halved. The division is Adam's correction of the bias
    towards zero (Kingma & Ba 2015, section 3), so the curve starts at the first value. NaN and infinite values have no
    weight; before the first finite value the mean is NaN."""
    decay = 0.5 ** (1 / halflife)
    total = weight = 0.0
    means = []
    for value in values:
        finite = math.isfinite(value)
        total = decay * total + (value if finite else 0.0)
        weight = decay * weight + finite
        means.append(total / weight if weight else math.nan)
    return means


def loss_plot(metrics: list[dict[str, Any]], validation: list[dict[str, Any]], path: Path) -> Path:
    """Plot loss (of each step, and its running mean), validation loss if measured, and learning rate over the steps.

    Returns the PNG at `path`. Without metrics the axes are empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [line["step"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    halflife = max(1, len(losses) // 50)  # the timestep dominates single losses, so the mean is over many steps

    figure = Figure(figsize=(8, 4.5), layout="constrained")  # not pyplot, which keeps global state
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    rates = axes.twinx()
    axes.set_zorder(rates.get_zorder() + 1)  # draws the loss in front of the learning rate
    axes.patch.set_visible(False)
    (raw,) = axes.plot(steps, losses, color="#9ec5e8", linewidth=0.8, label="loss")
    label = f"running mean, half-life {halflife} steps" if halflife > 1 else "running mean, half-life 1 step"
    (mean,) = axes.plot(steps, running_mean(losses, halflife), color="#1f4e79", linewidth=2, label=label)
    (rate,) = rates.plot(steps, [line["lr"] for line in metrics], color="#b0703c", linewidth=0.8, label="learning rate")
    measured = []
    if validation:
        times, values = [line["step"] for line in validation], [line["loss"] for line in validation]
        measured = axes.plot(times, values, color="#2e8b57", marker="o", markersize=3, label="validation loss")
    rates.set_ylabel("learning rate", color="#b0703c")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    for axis in (axes, rates):
        axis.spines.top.set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(handles=[raw, mean, *measured, rate], loc="outside upper left", ncols=4, frameon=False)
    return write_atomically(path, lambda file: FigureCanvasAgg(figure).print_png(file))
