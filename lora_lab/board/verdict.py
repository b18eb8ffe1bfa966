"""Decide which run is the best, and explain it in one sentence in each language."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lora_lab.board.read import Sweep, TrainedRun, final_validation_loss

LANGUAGES = ("en", "ko")


@dataclass(frozen=True)
class Verdict:
    """The ranking of the runs of a sweep, which are referred to by their numbers."""

    measure: str | None  # the name of a score, validation_loss, or None if there is neither
    ranking: tuple[int, ...]  # the done runs that have the measure, the best first
    ties: tuple[int, ...]  # those within the interval of the best
    sentence: Mapping[str, str]  # language -> which run is the best, and why


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
        measure = "score" if "score" in names else next(iter(names))
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
        return words()[key][language].format(**values)

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
    yield say(interval, run=label(best, sweep), value=value, low=low, high=high)
    if base_score and base_score.value >= score.value:
        yield say("no_better_than_base", value=f"{base_score.value:.2f}")
    if len(ties) == 1:
        yield say(
            "tie", run=label(sweep.runs[ties[0]], sweep), value=f"{sweep.runs[ties[0]].scores[measure].value:.2f}"
        )
    elif ties:
        format_value = " / ".join(label(sweep.runs[i], sweep) for i in ties[:3]) + (" …" if len(ties) > 3 else "")
        yield say("ties", runs=format_value, number=len(ties))
    elif len(ranking) > 1:
        yield say("clear")


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
    axis."""
    keys = sorted(sweep.swept, key=lambda key: key == "lr")  # the learning rate is the columns
    if len(sweep.runs) == 1:
        return "@step", "@prompt"
    if len(keys) == 1:
        return keys[0], "@prompt"
    if len(keys) == 2 and len(sweep.runs) > len(sweep.swept[keys[0]]) * len(sweep.swept[keys[1]]) / 2:
        return keys[0], keys[1]
    return "@run", "@prompt"
