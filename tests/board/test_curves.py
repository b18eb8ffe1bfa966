import json
import math

import numpy as np
import pytest
from PIL import Image

from lora_lab.board.read import loss_plot, read_metrics, running_mean

LINES = [{"step": step, "loss": 1 / step, "lr": 1e-4, "grad_norm": 0.5} for step in range(1, 41)]


def test_metrics_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    assert read_metrics(path) == LINES


def test_an_incomplete_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lo\n{"step": 2, "loss": 0.5}\n')
    with pytest.raises(json.JSONDecodeError):
        read_metrics(path)


def test_the_running_mean_starts_at_the_first_value_and_keeps_a_constant():
    assert running_mean([3.0] * 20, halflife=5) == pytest.approx([3.0] * 20)


def test_a_value_loses_half_its_weight_in_a_halflife():
    # 1 then 0 0: after two values at halflife 2 the first weighs 1/2, the newest 1.
    weights = [0.5, 0.5**0.5, 1.0]
    assert running_mean([1.0, 0.0, 0.0], halflife=2)[-1] == pytest.approx(weights[0] / sum(weights))


def test_a_nan_does_not_blank_the_rest_of_the_curve():
    means = running_mean([math.nan, 2.0, math.inf, 2.0], halflife=1)
    assert math.isnan(means[0]) and means[1:] == pytest.approx([2.0, 2.0, 2.0])


def test_a_falling_loss_falls_in_the_plot(tmp_path):
    picture = Image.open(loss_plot(LINES, [], tmp_path / "loss.png")).convert("RGB")
    pixels = picture.load()
    below_the_legend = [(x, y) for x in range(picture.width) for y in range(picture.height // 8, picture.height)]
    mean = [(x, y) for x, y in below_the_legend if pixels[x, y] == (0x1F, 0x4E, 0x79)]
    assert min(mean)[1] < max(mean)[1]  # pixels count downwards
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_run_without_metrics_has_an_empty_plot(tmp_path, count):
    assert Image.open(loss_plot(LINES[:count], [], tmp_path / "loss.png")).size == (800, 450)


def test_the_validation_loss_is_drawn_where_it_was_measured(tmp_path):
    def green(validation):
        picture = np.asarray(Image.open(loss_plot(LINES, validation, tmp_path / "loss.png")).convert("RGB"))
        rows, columns = np.nonzero((picture[60:] == (0x2E, 0x8B, 0x57)).all(axis=2))  # below the legend
        return rows, columns

    assert len(green([])[0]) == 0
    rows, columns = green([{"step": 10, "loss": 0.2}, {"step": 30, "loss": 0.8}])
    assert rows[columns.argmin()] > rows[columns.argmax()]  # pixels count downwards
