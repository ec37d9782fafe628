"""The plots of seeds.py: accuracy and loss against bytes and against device seconds, a band over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fedloom.simulations.plots import DASHES, MARKERS, PALETTE, SETTINGS

COLOURS = (*PALETTE[:7], "#8c564b", "#7f7f7f", "#b8860b", "#6a3d9a")  # one each: more methods than the palette has
SHAPES = (*MARKERS, "<", ">", "p")

Curves = Mapping[str, Sequence[Mapping[str, Any]]]


def draw(curves: Curves, devices: int, to: Path) -> list[Path]:
    """Write TO-bytes.png and TO-seconds.png: the mean over seeds, and the range of the seeds as a band."""
    to.parent.mkdir(parents=True, exist_ok=True)
    metric = str(next(iter(curves.values()))[0]["metric"]).replace("_", " ")
    written = []
    for name, column, scale, title in (
        ("bytes", 3, 1e3 * devices, "kB a device, up and down"),
        ("seconds", 4, 1.0, "seconds of training, all devices together"),
    ):
        with mpl.rc_context(SETTINGS):
            figure = Figure(figsize=(11, 4.4), layout="constrained")
            FigureCanvasAgg(figure)
            for axes, value, label in zip(figure.subplots(1, 2), (1, 2), (metric, "loss"), strict=True):
                _panel(axes, curves, column, scale, value)
                axes.set_xlabel(title)
                axes.set_title(label, loc="left", fontsize=10)
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
            path = to.with_name(f"{to.name}-{name}.png")
            figure.savefig(path, dpi=130)
            written.append(path)
    return written


def _panel(axes: Any, curves: Curves, column: int, scale: float, value: int) -> None:
    for i, (label, found) in enumerate(curves.items()):
        points = np.array([curve["points"] for curve in found])  # [seeds, rounds, columns]
        x, y = points[:, 1:, column].mean(0) / scale, points[:, 1:, value]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(
            x, y.mean(0), DASHES[i % len(DASHES)], color=colour, marker=SHAPES[i % len(SHAPES)], ms=5, label=label
        )
        axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.12, lw=0)
    start = float(np.mean([curve["points"][0][value] for found in curves.values() for curve in found]))
    axes.axhline(start, color="grey", lw=0.8, ls=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, axis="y")
