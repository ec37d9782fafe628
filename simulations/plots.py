"""The report's plots: Okabe-Ito colours, one marker and dash per strategy, labels at the lines' ends.

Figures are made by matplotlib's object API, so nothing here touches pyplot or keeps a caller's settings changed. The
palette is Okabe and Ito's (2008, "Color Universal Design"); markers differ too, so that colour never tells alone.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fedloom.server.units import Metric, human_bytes

INK, RULE = "#1c2126", "#d3d8de"  # become the page's own colours in SVG
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK, "#F0E442")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.parse_math": False,  # names are text, whatever dollars they hold
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.8,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
}
WIDTH, HEIGHT, WIDE = 5.6, 3.7, 9.6  # inches
STEPS = (1, 2, 2.5, 5, 10)  # of round ticks
LABEL_GAP = 0.19  # inches from one label's baseline to the next
BARS, TICKS = 60, 40  # above these, devices are drawn as one outline, and only some are named


def shorten(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One strategy's evaluated rounds, and its devices before and after."""

    name: str
    rounds: Sequence[int]
    metric: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    loss: Sequence[float]
    traffic: Sequence[float]
    """Bytes up and down so far, over all devices."""
    before: Mapping[str, float]
    after: Mapping[str, float]
    examples: Mapping[str, int]
    """Held-out examples by device."""
    up: float
    down: float
    """Bytes for each device, over the whole run."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure as the report carries it."""

    key: str
    title: str
    caption: str
    svg: str
    png: bytes
    wide: bool


def colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def swatch(index: int) -> str:
    """A strategy's colour in CSS."""
    return colour(index).replace(INK, "currentColor")


def draw_plots(curves: Sequence[Curve], metric: Metric) -> list[Plot]:
    """Every plot of a report; the loss has its own only where it is not what runs are judged by."""
    band = "The band is the 95% interval over devices."
    fall = "" if metric.is_share else " Lower is better."
    metric_title, device_title = f"{metric.title} by round", f"{metric.title} on each device"
    plots = [render("metric", metric_title, band + fall, lambda f: _by_round(f, curves, metric))]
    if metric.key != "loss":
        caption = "Mean loss per token on held-out examples; lower is better."
        plots.append(render("loss", "Loss by round", caption, lambda f: _loss(f, curves)))
    caption = "Every byte up and down so far, evaluation included, over all devices; each point is an evaluated round."
    plots.append(render("traffic", f"{metric.title} against traffic", caption, lambda f: _traffic(f, curves, metric)))
    caption = "For one device over the whole run, evaluation included: sent up (solid) and down (hatched)."
    plots.append(render("bytes", "Bytes per device", caption, lambda f: _bytes(f, curves)))
    caption = "Bars: after the last round; dashes: before the first. In brackets: held-out examples of the device."
    plots.append(render("devices", device_title, caption, lambda f: _devices(f, curves, metric), wide=True))
    return plots


def render(key: str, title: str, caption: str, draw: Callable[[Figure], None], *, wide: bool = False) -> Plot:
    """Draw on a figure of its own and keep it as SVG and PNG."""
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": f"fedloom-{key}"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in another script; the page's own fonts have it
        figure = Figure(figsize=(WIDE if wide else WIDTH, HEIGHT))
        FigureCanvasAgg(figure)
        draw(figure)
        height = figure.get_figheight()
        figure.text(0.1 / figure.get_figwidth(), 1 - 0.24 / height, title, weight="bold", size=11)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=144, facecolor="white")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    return Plot(key=key, title=title, caption=caption, svg=_inline(svg.getvalue(), key), png=png.getvalue(), wide=wide)


def _inline(svg: str, key: str) -> str:
    """Matplotlib's SVG as part of a page: no prologue or group ids, sized by its container, in the page's own ink."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = body.replace("<svg ", f'<svg role="img" aria-labelledby="plot-{key} caption-{key}" ', 1)
    return body.replace(INK, "currentColor").replace(RULE, "var(--rule)")


def _axes(figure: Figure, *, left: float, right: float, bottom: float, top: float = 0.45) -> Axes:
    """One axes with margins in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def _line_axes(figure: Figure, curves: Sequence[Curve]) -> Axes:
    """Axes with room on the right for a label each."""
    figure.set_figheight(max(HEIGHT, 1.0 + LABEL_GAP * (len(curves) + 1)))
    longest = max(len(shorten(curve.name)) for curve in curves)
    axes = _axes(figure, left=0.7, right=0.5 + 0.079 * longest, bottom=0.55)
    axes.grid(axis="y")
    return axes


def _style(index: int) -> dict[str, Any]:
    """A strategy's look, the same in every plot."""
    return {
        "color": colour(index),
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(PALETTE) % len(DASHES)],
        "markeredgecolor": INK,
        "markeredgewidth": 0.5,
        "markersize": 5,
        "linewidth": 1.8,
    }


def _lines(axes: Axes, curves: Sequence[Curve], points: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
    """One line per curve, named at the right edge."""
    for index, (x, y) in enumerate(points):
        axes.plot(x, y, markevery=max(1, math.ceil(len(x) / 12)), **_style(index))
    axes.margins(x=0.02)
    ends = [(x[-1], y[-1]) if x and math.isfinite(y[-1]) else None for x, y in points]
    _name_ends(axes, [curve.name for curve in curves], ends)


def _name_ends(axes: Axes, names: Sequence[str], ends: Sequence[tuple[float, float] | None]) -> None:
    """Names in the right margin, as near to their line's end as they fit, with a thread from one to the other."""
    figure = axes.figure
    box = axes.get_position()
    gap = LABEL_GAP / (box.height * figure.get_figheight())  # type: ignore[union-attr]
    inch = 1 / (box.width * figure.get_figwidth())  # type: ignore[union-attr]
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    starts = [(1.0, 0.0) if end is None else tuple(to_axes.transform(end)) for end in ends]
    for index, height in enumerate(spread([float(y) for _, y in starts], gap)):
        style = _style(index)
        x = 1 + 0.2 * inch
        if ends[index] is not None:
            thread = ([starts[index][0], x], [starts[index][1], height])
            axes.plot(*thread, color=colour(index), lw=0.8, ls=":", transform=axes.transAxes, clip_on=False)
        axes.plot([x], [height], transform=axes.transAxes, clip_on=False, **style)
        name = shorten(names[index]) + ("" if ends[index] else " (n/a)")
        axes.text(x + 0.09 * inch, height, name, transform=axes.transAxes, va="center")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved as little as can be (least squares) so that all are `gap` apart, and within 0 and 1 if they fit.

    With the heights in order, h_i - i * gap must not fall: an isotonic regression, by pooling adjacent violators.
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    pools: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        pools.append((heights[index] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (last, many), (earlier, few) = pools.pop(), pools.pop()
            pools.append(((last * many + earlier * few) / (many + few), many + few))
    top = max(0.0, 1.0 - (len(heights) - 1) * gap)
    level = [min(max(value, 0.0), top) for value, count in pools for _ in range(count)]
    moved = [0.0] * len(heights)
    for rank, index in enumerate(order):
        moved[index] = level[rank] + rank * gap
    return moved


def _by_round(figure: Figure, curves: Sequence[Curve], metric: Metric) -> None:
    axes = _line_axes(figure, curves)
    for index, curve in enumerate(curves):
        axes.fill_between(curve.rounds, curve.low, curve.high, color=colour(index), alpha=0.13, linewidth=0)
    _metric_axis(axes, metric)
    _lines(axes, curves, [(curve.rounds, curve.metric) for curve in curves])
    _round_axis(axes)


def _loss(figure: Figure, curves: Sequence[Curve]) -> None:
    axes = _line_axes(figure, curves)
    _lines(axes, curves, [(curve.rounds, curve.loss) for curve in curves])
    axes.set_ylabel("Loss")
    _round_axis(axes)


def _round_axis(axes: Axes) -> None:
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _metric_axis(axes: Axes, metric: Metric) -> None:
    axes.set_ylabel(metric.title)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=STEPS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: metric.tick(value)))


def _traffic(figure: Figure, curves: Sequence[Curve], metric: Metric) -> None:
    axes = _line_axes(figure, curves)
    axes.set_xscale("log")
    points = []
    for curve in curves:
        moved = [(bytes_, value) for bytes_, value in zip(curve.traffic, curve.metric, strict=True) if bytes_ > 0]
        points.append(([x for x, _ in moved], [y for _, y in moved]))
    _metric_axis(axes, metric)
    _lines(axes, curves, points)
    axes.set_xlabel("Bytes up and down so far (log scale)")
    axes.xaxis.set_major_locator(FixedLocator(_byte_ticks(*axes.get_xlim())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value, ".3g")))


def _byte_ticks(low: float, high: float) -> list[float]:
    """At most four round numbers of bytes between two bounds, evenly on a log scale as far as they go."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 4:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 4)]


def _bytes(figure: Figure, curves: Sequence[Curve]) -> None:
    figure.set_figheight(max(2.0, 0.85 + 0.55 * len(curves)))
    longest = max(len(shorten(curve.name)) for curve in curves)
    axes = _axes(figure, left=0.3 + 0.079 * longest, right=1.1, bottom=0.4)
    for index, curve in enumerate(curves):
        for offset, value, hatch in ((-0.19, curve.up, ""), (0.19, curve.down, "////")):
            face = "none" if hatch else colour(index)
            edge = colour(index) if hatch else INK
            axes.barh(index + offset, value, height=0.34, color=face, edgecolor=edge, hatch=hatch, linewidth=0.6)
            word = "down" if hatch else "up"
            axes.annotate(
                f"{word} {human_bytes(value)}", (value, index + offset), (4, 0), textcoords="offset points", va="center"
            )
    axes.set_yticks(range(len(curves)), [shorten(curve.name) for curve in curves])
    axes.set_ylim(len(curves) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(1.0, *(max(curve.up, curve.down) for curve in curves)) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value, ".3g")))
    axes.grid(axis="x")


def _devices(figure: Figure, curves: Sequence[Curve], metric: Metric) -> None:
    """A row of bars for each strategy, devices in the same order in each."""
    names = sorted({name for curve in curves for name in curve.after})
    examples = {name: count for curve in curves for name, count in curve.examples.items()}
    labels = [f"{shorten(name, 16)} ({examples[name]})" for name in names]
    rows, under = len(curves), 0.2 + 0.072 * max(len(label) for label in labels)
    figure.set_figheight(0.3 + 1.25 * rows + under)
    height = figure.get_figheight()
    shared: Axes | None = None
    for index, curve in enumerate(curves):
        base = (under + 1.25 * (rows - 1 - index)) / height
        axes = figure.add_axes((0.7 / WIDE, base, 1 - 0.9 / WIDE, 0.88 / height), sharex=shared, sharey=shared)
        shared = shared or axes
        _device_bars(axes, curve, names, colour(index))
        axes.set_title(shorten(curve.name, 60), loc="left", size=10, pad=3)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3, steps=STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: metric.tick(value)))
        axes.grid(axis="y")
        axes.tick_params(axis="x", labelbottom=index == rows - 1, length=0)
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.set_ylim(bottom=0)
        step = math.ceil(len(names) / TICKS)
        axes.set_xticks(range(0, len(names), step), labels[::step], rotation=90, size=9)


def _device_bars(axes: Axes, curve: Curve, names: Sequence[str], face: str) -> None:
    before, after = (np.array([table.get(name, np.nan) for name in names]) for table in (curve.before, curve.after))
    x, heights = np.arange(len(names)), np.where(np.isfinite(after), after, 0.0)
    alpha = 0.5 if face == INK else 1.0  # the dashes are ink too
    if len(names) > BARS:  # one path where there would be thousands
        edges = np.arange(len(names) + 1) - 0.5
        axes.stairs(heights, edges, fill=True, color=face, alpha=alpha)
        axes.stairs(before, edges, color=INK, linewidth=0.7, baseline=None)
        return
    axes.bar(x, heights, width=0.72, alpha=alpha, color=face, edgecolor=INK, linewidth=0.4)
    axes.hlines(before, x - 0.46, x + 0.46, color=INK, linewidth=1.6)
