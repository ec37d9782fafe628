"""The plots of seeds.py: accuracy against bytes and against device seconds, a band over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedloom.simulations.plots import DASHES, MARKERS, PALETTE, SETTINGS


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], devices: int, to: Path) -> list[Path]:
    """Write TO-bytes.png and TO-seconds.png: the mean over seeds, and the range of the seeds as a band."""
    to.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for name, column, scale, title in (
        ("bytes", 3, 1e3 * devices, "kB a device, up and down"),
        ("seconds", 4, 1.0, "seconds of training, all devices together"),
    ):
        with mpl.rc_context(SETTINGS):
            figure = Figure(figsize=(8.4, 4.6), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            for i, (label, found) in enumerate(curves.items()):
                points = np.array([curve["points"] for curve in found])  # [seeds, rounds, columns]
                x, y = points[:, 1:, column].mean(0) / scale, points[:, 1:, 1]
                look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
                axes.plot(x, y.mean(0), ls=DASHES[i % len(DASHES)], ms=5, label=label, **look)
                axes.fill_between(x, y.min(0), y.max(0), color=look["color"], alpha=0.12, lw=0)
            start = np.mean([curve["points"][0][1] for found in curves.values() for curve in found])
            axes.axhline(float(start), color="grey", lw=0.8, ls=":")
            axes.set_xscale("log")
            axes.set_xlabel(title)
            axes.set_ylabel(next(iter(curves.values()))[0]["metric"].replace("_", " "))
            axes.grid(True, axis="y")
            figure.legend(loc="outside right center", frameon=False, fontsize=9)
            path = to.with_name(f"{to.name}-{name}.png")
            figure.savefig(path, dpi=150)
            written.append(path)
    return written
