"""Charts: round ticks, every point inside its box, nothing drawn of nothing."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.server.dashboard.charts import DRAWN, HEIGHT, MARKED, WIDTH, Series, draw, thinned, ticks
from fedloom.server.units import Metric

VALUES = st.floats(min_value=-1e12, max_value=1e12)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (0.31, 0.56, [0.3, 0.4, 0.5, 0.6]),
        (0.0, 7.3e6, [0, 2e6, 4e6, 6e6, 8e6]),
        (2.0, 2.0, [1, 1.5, 2, 2.5, 3]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_ticks_of_rounds_are_whole() -> None:
    assert ticks(0, 4, 7, whole=True) == [0, 1, 2, 3, 4]
    assert ticks(0, 14, 7, whole=True) == [0, 3, 6, 9, 12, 15]


@given(points=st.lists(VALUES, min_size=1, max_size=60), zero=st.booleans())
def test_every_point_lies_in_the_box(points: list[float], zero: bool) -> None:
    series = [Series(label="a", points=list(enumerate(points)))]
    values = [abs(value) for value in points] if zero else points
    if zero:
        series = [Series(label="a", points=list(enumerate(values)))]
    chart = draw("k", series, unit="u", last=10, text=str, tick=str, zero=zero)
    assert chart is not None
    assert 2 <= len(chart.y_ticks) <= 9
    for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", chart.lines[0].path):
        assert chart.left - 0.1 <= float(x) <= chart.right + 0.1
        assert chart.top - 0.1 <= float(y) <= chart.bottom + 0.1
    assert all(0 <= tick.at <= WIDTH for tick in chart.x_ticks)
    assert all(0 <= tick.at <= HEIGHT for tick in chart.y_ticks)


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 5e-324), (1e12, 1e12 + 1e-4), (7.0,)])
def test_flat_lines_have_an_axis_too(values: tuple[float, ...]) -> None:
    chart = draw("k", [Series(label="a", points=list(enumerate(values)))], unit="", last=3, text=str, tick=str)
    assert chart is not None
    assert 2 <= len(chart.y_ticks) <= 9
    assert all(float(tick.text) >= 0 for tick in chart.y_ticks)


def test_a_chart_says_where_its_lines_begin_and_end() -> None:
    metric = Metric(key="exact_match")
    series = [Series(label="Exact match", points=[(0, 0.325), (3, 0.56)]), Series(label="empty", points=[])]
    chart = draw("m", series, unit="%", last=9, text=metric.text, tick=metric.tick)
    assert chart is not None
    assert chart.says == "Exact match: 32.5% in round 0, 56.0% in round 3."
    assert [marker.says for marker in chart.lines[0].markers][-1] == "Exact match, round 3: 56.0%"
    assert chart.x_ticks[0].text == "0"
    assert len(chart.lines) == 1
    assert draw("m", [Series(label="empty", points=[])], unit="%", last=9, text=str, tick=str) is None


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    points = [(round, 1.0 / (1 + round)) for round in range(2000)]
    few = thinned(points)
    assert (len(few), few[0], few[-1]) == (DRAWN, points[0], points[-1])
    assert few == sorted(set(few))
    chart = draw("m", [Series(label="a", points=points)], unit="", last=0, text=str, tick=str)
    assert chart is not None
    assert len(chart.lines[0].markers) == 1
    chart = draw("m", [Series(label="a", points=points[:MARKED])], unit="", last=0, text=str, tick=str)
    assert chart is not None
    assert len(chart.lines[0].markers) == MARKED
