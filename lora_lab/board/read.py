"""A sweep, or several run folders, as its files tell it; nobody parses logs."""

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.base.locate import locate_folder
from lora_lab.board.curves import read_metrics
from lora_lab.errors import InputError
from lora_lab.images.scan import natural_key, pictures
from lora_lab.launch import command_line, config
from lora_lab.settings.decides import shown_on_page

STAGES = ("train", "pipeline")  # whose runs can be compared
DRAWN = re.compile(r"p(\d+)-s(\d+)\.png")


@dataclass(frozen=True)
class Score:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Picture:
    file: Path
    step: int  # -1: drawn by the base without the LoRA
    prompt: str  # with the trigger
    seed: int


@dataclass(frozen=True)
class Run:
    name: str  # its folder, as seen from what it is compared in
    folder: Path
    status: str  # done, failed, unfinished (running, or stopped), missing (not begun)
    error: str | None  # of a failed run, one sentence
    overrides: tuple[str, ...]
    settings: dict[str, Any]  # every key of its configuration, dotted, and the option of every group
    step: int  # how far it came
    seconds: float | None
    scores: dict[str, Score]
    scores_before: dict[str, Score]  # of the base without the LoRA
    loss: tuple[tuple[int, float], ...]
    validation_loss: tuple[tuple[int, float], ...]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Sweep:
    title: str
    runs: tuple[Run, ...]
    swept: dict[str, list[Any]]  # a setting in which runs differ -> its values, in order
    training: tuple[Path, ...]  # a few pictures of what was to be learnt


def read_sweep(folders: Sequence[Path]) -> Sweep:
    """All training runs in `folders`, which are sweeps, runs or hold some; there may be none."""
    found = list({run.resolve(): run for folder in folders for run in run_folders(folder)}.values())
    shared = os.path.commonpath([f.resolve().parent if f in found else f.resolve() for f in folders])
    runs = [_run(folder, folder.resolve().relative_to(shared).as_posix()) for folder in found]
    runs = [run for run in runs if run.settings.get("stage", "train") in STAGES]
    runs += [run for folder in folders for run in _missing(folder, runs)]
    sweep = folders[0].resolve() if len(folders) == 1 else None
    title = " ".join(sweep.parts[-2:]) if sweep and (sweep / "multirun.yaml").is_file() else (sweep or Path()).name
    return Sweep(title, tuple(runs), _swept(runs), _training_pictures(runs))


def run_folders(folder: Path, depth: int = 4) -> list[Path]:
    """Run folders in `folder`, in natural order; what lies inside a run is not looked at."""
    if (folder / ".hydra").is_dir():
        return [folder]
    if depth == 0 or not folder.is_dir():
        return []
    inner = sorted((f for f in folder.iterdir() if f.is_dir()), key=lambda f: natural_key(f.name))
    return [run for f in inner for run in run_folders(f, depth - 1)]


def _run(folder: Path, name: str) -> Run:
    settings, overrides = config.recorded(folder)
    result, failed = _json(folder / "result.json"), _json(folder / "failed.json")
    metrics, validation = _curve(folder / "metrics.jsonl"), _curve(folder / "validation.jsonl")
    return Run(
        name=name,
        folder=folder,
        status="failed" if failed else "done" if result else "unfinished",
        error=str(failed.get("error", "")) if failed else None,
        overrides=tuple(overrides),
        settings=settings,
        step=metrics[-1][0] if metrics else 0,
        seconds=result.get("seconds"),
        scores=_scores(result.get("scores")),
        scores_before=_scores(result.get("scores_before")),
        loss=metrics,
        validation_loss=validation,
        pictures=tuple(_pictures(folder / "samples", settings)),
    )


def _missing(folder: Path, runs: list[Run]) -> list[Run]:
    """The jobs that multirun.yaml plans and of which there is no folder yet."""
    begun = [{*run.overrides} for run in runs]
    missing = []
    for number, point in enumerate(command_line.planned(folder / "multirun.yaml")):
        if not any({*point} <= overrides for overrides in begun):
            settings = {o.partition("=")[0]: command_line.value_of(o) for o in point}
            known = next((run.settings for run in runs if run.settings), {})  # of what no override speaks
            nothing = Run(f"({number})", folder / str(number), "missing", None, tuple(point), known | settings,
                          0, None, {}, {}, (), (), ())  # fmt: skip
            missing.append(nothing)
    return [run for run in missing if run.settings.get("stage", "train") in STAGES]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _scores(given: object) -> dict[str, Score]:
    scores = {}
    for name, score in given.items() if isinstance(given, dict) else ():
        if isinstance(score, dict) and _finite(score.get("value")):
            low, high = (score[end] if _finite(score.get(end)) else score["value"] for end in ("low", "high"))
            scores[name] = Score(score["value"], low, high)
    return scores


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _curve(path: Path) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((line["step"], line["loss"]) for line in read_metrics(path) if _finite(line.get("loss")))
    except (OSError, ValueError, KeyError):  # not there yet, or damaged: a run without a curve is still a run
        return ()


def _pictures(samples: Path, settings: dict[str, Any]) -> Iterable[Picture]:
    stage = "stage.train." if settings.get("stage") == "pipeline" else "stage."
    prompts = settings.get(f"{stage}prompts") or []
    for folder in (samples / "base", *sorted(samples.glob("step-*"))):
        step = -1 if folder.name == "base" else int(folder.name.removeprefix("step-"))
        for file in sorted(folder.glob("p*-s*.png"), key=lambda f: natural_key(f.name)):
            named = DRAWN.fullmatch(file.name)
            if named:
                number, seed = map(int, named.groups())
                text = prompts[number] if number < len(prompts) else f"p{number}"
                yield Picture(file, step, text.replace("{trigger}", str(settings.get("trigger", ""))), seed)


def _swept(runs: list[Run]) -> dict[str, list[Any]]:
    """The settings that some command line names and in which the runs differ, with their values in order."""
    named = dict.fromkeys(o.partition("=")[0].lstrip("+") for run in runs for o in run.overrides)
    swept = {}
    for key in named:
        values = list({str(v): v for v in (run.settings.get(key) for run in runs if run.settings)}.values())
        if len(values) > 1 and shown_on_page(key):
            swept[key] = sorted(values) if all(_finite(v) for v in values) else values
    return swept


def _training_pictures(runs: list[Run], number: int = 4) -> tuple[Path, ...]:
    """A few of the pictures that the runs learnt from, if they are still there."""
    settings = next((run.settings for run in runs if run.settings), {})
    root = settings.get("dataset.root")
    root = root[0] if isinstance(root, list) and root else root
    root = root.get("root") if isinstance(root, dict) else root
    try:
        found = list(pictures(locate_folder("dataset.root", root if isinstance(root, str) else None)).values())
    except InputError:
        return ()
    spread = [round(i * (len(found) - 1) / (number - 1)) for i in range(number)] if found else []
    return tuple(found[i] for i in dict.fromkeys(spread))


def validation_loss(run: Run) -> float | None:
    """Of the finished LoRA."""
    return run.validation_loss[-1][1] if run.validation_loss else None


def last_loss(run: Run) -> float | None:
    """Mean of the last 50 steps, as result.json has it."""
    return statistics.mean(loss for _, loss in run.loss[-50:]) if run.loss else None
