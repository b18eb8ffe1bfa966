"""The bounds on how the source is built: tests/house.py measures, docs/decisions/module-size.md gives the reasons."""

from pathlib import Path

import pytest

from tests.house import Measure, entered_modules, static_measures

CHECKOUT = Path(__file__).parents[1]


def missed(measures: list[Measure]) -> list[str]:
    return [f"{m.name.strip()}: {m.now}, target {m.target}: {m.items[:20]}" for m in measures if not m.holds]


def test_the_source_is_built_as_it_should_be():
    measures = static_measures(CHECKOUT)
    assert sum(bool(measure.target) for measure in measures) >= 9
    assert missed(measures) == []


@pytest.mark.slow
def test_short_runs_enter_few_modules():
    measures = entered_modules(CHECKOUT)
    assert len(measures) == 4
    assert missed(measures) == []


@pytest.mark.parametrize(
    ("now", "target", "holds"),
    [("36", "<= 36", True), ("37", "<= 36", False), ("90%", ">= 90%", True), ("89%", ">= 90%", False),
     ("0", "0", True), ("1", "0", False), ("failed", "<= 36", False), ("12", "", True)],
)  # fmt: skip
def test_a_measure_holds_up_to_its_target(now, target, holds):
    assert Measure("", now, target, []).holds is holds
