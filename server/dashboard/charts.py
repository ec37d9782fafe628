"""Line charts as shapes with places in pixels; the template `chart.svg.j2` draws them.

A chart is about as wide as a phone, so that its letters are never scaled to where they cannot be read. Lines differ by
dashes and markers as well as by colour (Okabe and Ito's palette, in the style sheet).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 26, 40
SHAPES = ("circle", "square", "diamond")
MARKED, DRAWN = 40, 300  # points up to which each has a marker, and above which lines are thinned
TINY = 1e-12  # a value below this is drawn as zero
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: (round, value) points in order."""

    label: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A tick's place and text."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Marker:
    """One point: its shape as a path, and what it says when pointed at."""

    path: str
    says: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line as drawn; `index` chooses its look, `sample` is its marker for the legend."""

    index: int
    label: str
    path: str
    markers: tuple[Marker, ...]
    sample: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart ready to draw. `says` is it in words."""

    key: str
    unit: str
    says: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers at even steps that take in `low` and `high`, about `most` of them; `whole` allows no fractions."""
    span = high - low
    size = max(abs(low), abs(high))
    if span <= 1e-9 * size or size < TINY:  # a flat line
        span = size if size >= TINY else 1.0
        low, high = low - span / 2, high + span / 2
    raw = span / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * step for step in STEPS if power * step >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(points: Sequence[tuple[int, float]], most: int = DRAWN) -> list[tuple[int, float]]:
    """At most `most` points, evenly chosen, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def draw(
    key: str,
    series: Sequence[Series],
    *,
    unit: str,
    last: int,
    text: Callable[[float], str],
    tick: Callable[[float], str],
    zero: bool = False,
) -> Chart | None:
    """A chart of the lines that have points, or None where none has.

    Args:
        unit: what the values are, for the axis.
        last: the round that the axis goes to at least.
        text: writes a value in words and at its marker.
        tick: writes a value at the axis.
        zero: whether the value axis starts at zero.
    """
    values = [value for line in series for _, value in line.points]
    if not values:
        return None
    rounds = [round for line in series for round, _ in line.points]
    y_values = ticks(0.0 if zero else min(values), max(values), 5)
    if min(values) >= 0:  # what cannot be negative has no negative ticks
        y_values = [value for value in y_values if value >= 0]
    start, end = min(rounds), max(last, *rounds, min(rounds) + 1)

    def x(round: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (round - start) / (end - start)

    def y(value: float) -> float:
        low, high = y_values[0], y_values[-1]
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - low) / (high - low)

    lines = tuple(_line(index, line, x, y, text) for index, line in enumerate(series) if line.points)
    return Chart(
        key=key,
        unit=unit,
        says=_in_words(series, text),
        lines=lines,
        x_ticks=tuple(
            Tick(at=x(round), text=f"{round:.0f}")
            for round in ticks(start, end, 7, whole=True)
            if start <= round <= end
        ),
        y_ticks=tuple(Tick(at=y(value), text=tick(value)) for value in y_values),
    )


def _line(
    index: int, line: Series, x: Callable[[float], float], y: Callable[[float], float], text: Callable[[float], str]
) -> Line:
    places = [(round, x(round), y(value), value) for round, value in thinned(line.points)]
    shape = SHAPES[index % len(SHAPES)]
    markers = tuple(
        Marker(path=marker(shape, at, height), says=f"{line.label}, round {round}: {text(value)}")
        for round, at, height, value in places
    )
    return Line(
        index=index,
        label=line.label,
        path="M" + " ".join(f"{at:.1f},{height:.1f}" for _, at, height, _ in places),
        markers=markers if len(places) <= MARKED else markers[-1:],
        sample=marker(shape, 12, 6),
    )


def marker(shape: str, x: float, y: float, size: float = 3.2) -> str:
    """A marker's outline around a place."""
    if shape == "circle":
        return f"M{x - size:.1f},{y:.1f} a{size},{size} 0 1 0 {2 * size},0 a{size},{size} 0 1 0 {-2 * size},0z"
    if shape == "square":
        side = 0.9 * size
        return f"M{x - side:.1f},{y - side:.1f} h{2 * side:.1f} v{2 * side:.1f} h{-2 * side:.1f}z"
    tall = 1.35 * size
    return f"M{x:.1f},{y - tall:.1f} l{tall:.1f},{tall:.1f} l{-tall:.1f},{tall:.1f} l{-tall:.1f},{-tall:.1f}z"


def _in_words(series: Sequence[Series], text: Callable[[float], str]) -> str:
    """For whoever does not see it: where each line begins and ends."""
    parts = []
    for line in series:
        if line.points:
            (first, begin), (last, end) = line.points[0], line.points[-1]
            parts.append(f"{line.label}: {text(begin)} in round {first}, {text(end)} in round {last}.")
    return " ".join(parts)
