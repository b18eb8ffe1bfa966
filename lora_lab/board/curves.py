"""The loss curve of a run: read metrics.jsonl, draw loss.png."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.runs import write_atomically


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
