"""A picture of what each device got, round by round: rows are devices by kind, colours ratios or ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import BaseModel

from fedloom.simulations.plots import INK, WIDE, Plot, render, shorten

ROWS = 60  # above these, devices are left out, evenly
NUMBERED = (40, 24)  # rows and rounds up to which a cell holds its rank
ROW = 0.21  # inches
BLANK = "#9aa3ac"  # a cell's colour where the device ran out of memory
SHADES = 32
MAP = "cividis"  # reads the same with any colour vision, and in grey


class Given(BaseModel):
    """What one device was given in a round, as `server/assigned.py` writes it."""

    rank: int
    batch: int
    seconds: float
    ratio: float | None = None
    modules: int | None = None
    ranks: int | None = None
    bits: int | None = None
    tensor_mb: float | None = None
    out_of_memory: bool = False

    @property
    def colour(self) -> float:
        """The pruning ratio, or where nothing is pruned the sum of the modules' ranks."""
        return float(self.ranks or 0) if self.ratio is None else self.ratio


@dataclass(frozen=True, kw_only=True)
class Row:
    """One device, and what devices of its kind have in common."""

    device: str
    kind: str
    rounds: Mapping[int, Given]


def rows_of(
    assigned: Mapping[int, Mapping[str, Given]], devices: Sequence[str], profiles: Sequence[str], lent: Sequence[float]
) -> list[Row]:
    """A row for each device that was ever given something, kinds together, those that lend least first.

    Args:
        devices: all of the fleet in the order of its numbers, by which `profiles` and `lent` (MB) repeat.
    """
    rows = []
    for index, device in enumerate(devices):
        rounds = {round: table[device] for round, table in assigned.items() if device in table}
        memory = lent[index % len(lent)] if lent else math.inf
        parts = [profiles[index % len(profiles)]] if profiles else []
        parts += [f"{memory:g} MB"] if lent else []
        if rounds:
            rows.append((memory, ", ".join(parts), Row(device=device, kind=", ".join(parts), rounds=rounds)))
    return [row for _, _, row in sorted(rows, key=lambda each: (each[0], each[1], each[2].device))]


def draw_assigned(rows: Sequence[Row], name: str, *, key: str) -> Plot:
    """The picture of one strategy's run."""
    shown = rows[:: math.ceil(len(rows) / ROWS)]
    pruned = any(given.ratio is not None for row in rows for given in row.rounds.values())
    caption = f"Colour: {'share of heads and channels pruned' if pruned else 'sum of the ranks of all modules'}; "
    caption += "number: rank" + ("" if pruned else " (the largest of its modules)") + "; \N{MULTIPLICATION SIGN} on "
    caption += "grey: ran out of memory; white: no answer that counted."
    if len(shown) < len(rows):
        caption += f" {len(shown)} of {len(rows)} devices, evenly chosen."
    title = f"What each device got: {shorten(name)}"
    return render(key, title, caption, lambda figure: _draw(figure, shown, pruned), wide=True)


def _draw(figure: Figure, rows: Sequence[Row], pruned: bool) -> None:
    figure.set_figheight(1.15 + ROW * len(rows))
    width, height = figure.get_size_inches()
    left = 0.3 + 0.075 * max(len(shorten(row.device, 16)) for row in rows)
    left += 0.075 * max(len(row.kind) for row in rows)
    inner = (left / width, 0.55 / height, 1 - (left + 1.1) / width, ROW * len(rows) / height)
    axes = figure.add_axes(inner)
    rounds = range(min(min(row.rounds) for row in rows), max(max(row.rounds) for row in rows) + 1)
    mesh = _cells(axes, rows, rounds)
    if len(rows) <= NUMBERED[0] and len(rounds) <= NUMBERED[1]:
        _numbers(axes, rows, rounds, mesh)
    _name_rows(axes, rows, rounds)
    bar = figure.add_axes((1 - 0.95 / width, inner[1], 0.13 / width, inner[3]))
    _scale(bar, mesh.norm.vmax)
    bar.set_ylabel("pruned" if pruned else "sum of ranks")
    bar.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=not pruned))


def _scale(bar: Axes, top: Any) -> None:
    """The colours' legend, as paths: matplotlib's own is a picture in the SVG, which the report's policy refuses."""
    edges = np.linspace(0.0, float(top), SHADES + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    bar.pcolormesh([0, 1], edges, middles[:, None], cmap=MAP, norm=Normalize(0.0, float(top)), edgecolor="face")
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.spines[:].set_visible(False)


def _cells(axes: Axes, rows: Sequence[Row], rounds: Sequence[int]) -> QuadMesh:
    values = np.full((len(rows), len(rounds)), np.nan)
    lost = np.full(values.shape, np.nan)
    for y, row in enumerate(rows):
        for round, given in row.rounds.items():
            (lost if given.out_of_memory else values)[y, round - rounds[0]] = given.colour
    edges = np.arange(len(rounds) + 1) + rounds[0] - 0.5, np.arange(len(rows) + 1) - 0.5
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    axes.pcolormesh(*edges, np.where(np.isnan(lost), np.nan, 0.0), cmap=mpl.colors.ListedColormap([BLANK]))
    return axes.pcolormesh(
        *edges, np.ma.masked_invalid(values), cmap=MAP, norm=Normalize(0, top or 1.0), edgecolor="white", linewidth=0.3
    )


def _numbers(axes: Axes, rows: Sequence[Row], rounds: Sequence[int], mesh: ScalarMappable) -> None:
    """Ranks in the cells, black or white: whichever is read better on the colour, on light and dark pages."""
    for y, row in enumerate(rows):
        for round, given in row.rounds.items():
            red, green, blue, _ = mesh.to_rgba(np.array([given.colour]))[0]
            light = given.out_of_memory or 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
            text = f"{given.rank}" + ("\N{MULTIPLICATION SIGN}" if given.out_of_memory else "")
            axes.text(round, y, text, ha="center", va="center", size=8, color="#000000" if light else "#ffffff")


def _name_rows(axes: Axes, rows: Sequence[Row], rounds: Sequence[int]) -> None:
    """Devices at the left edge, their kind once beside them, and a line between kinds."""
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [shorten(row.device, 16) for row in rows], size=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
    names = 0.12 + 0.075 * max(len(shorten(row.device, 16)) for row in rows)
    edge, beside, at = -names / (axes.get_position().width * WIDE), axes.get_yaxis_transform(), 0
    for kind, group in groupby(rows, key=lambda row: row.kind):
        many = len(list(group))
        axes.text(edge, at + (many - 1) / 2, kind, transform=beside, ha="right", va="center")
        if at:
            axes.plot([edge, 1], [at - 0.5] * 2, transform=beside, color=INK, lw=0.8, clip_on=False)
        at += many
