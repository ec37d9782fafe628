"""What a finished run shows: OUT/report.html, one page that needs nothing else, and its plots as OUT/plots/*.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from fedloom.protocols.seeds import derive_seed
from fedloom.server.pooling import DRAWS, interval, pool
from fedloom.server.units import Metric, human_bytes, human_seconds, plural
from fedloom.simulations.assigned import Given, draw_assigned, rows_of
from fedloom.simulations.plots import Curve, Plot, draw_plots, swatch

REPORT_FILE, PLOTS = "report.html", "plots"
TEMPLATES = Path(__file__).parent / "templates"
FEWEST = 6  # with fewer devices not even all of them agreeing is evidence at 5% (two-sided sign test: 2 / 2**5 > 0.05)
DEVICE_ROWS = 200  # above these the page's table of devices would outweigh the page

Parsed = TypeVar("Parsed", bound=BaseModel)
Table = Mapping[str, Mapping[str, float]]
"""What each device measured: sums and counts by name."""


class Entry(BaseModel):
    """One strategy in summary.json."""

    name: str
    folder: str
    strategy: str
    metric: str
    before: float
    after: float
    ci95: tuple[float, float]
    ci95_before: tuple[float, float]
    loss_before: float
    loss_after: float
    bytes_up: int
    bytes_down: int
    bytes_evaluation: int
    bytes_up_per_device: float
    bytes_down_per_device: float
    seconds: float
    device_seconds: float
    peak_rss_mb: float
    refused: int
    virtual_seconds: float | None = None
    idle_seconds: float | None = None


class Summary(BaseModel):
    """summary.json, as `runs.run_recipe` writes it."""

    name: str
    about: str
    model: str
    devices: int
    ranks: list[int]
    profiles: list[str] = []
    memory_mb: list[float] = []
    rounds: int
    seed: int
    metric: str
    machine: dict[str, object]
    strategies: list[Entry]


class Record(BaseModel):
    """One line of metrics.jsonl, as `server.loop` writes it; rounds without evaluation have neither table."""

    round: int
    evaluation: dict[str, float] = {}
    devices: dict[str, dict[str, float]] = {}
    assigned: dict[str, Given] = {}
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One strategy: its line of the summary and its evaluated rounds."""

    entry: Entry
    records: Sequence[Record]
    rounds: int
    assigned: Mapping[int, Mapping[str, Given]]

    @property
    def devices(self) -> Table:
        return self.records[-1].devices


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a strategy's metric ends from the reference's, over the devices that both measured."""

    name: str
    value: float
    low: float
    high: float
    devices: int
    reading: str


def write_report(out: Path) -> Path:
    """Read a finished run's folder and write its report.

    Returns:
        the path of OUT/report.html.

    Raises:
        ValueError: one line that names the file, and what is missing or malformed in it.
    """
    summary, runs = read_finished(out)
    metric = Metric(key=summary.metric)
    curves = [_curve(run, metric, summary.seed) for run in runs]
    reference = next((run for run in runs if run.entry.name == "fedloom"), runs[0])
    differences = [_difference(reference, run, metric, summary.seed) for run in runs if run is not reference]
    plots = draw_plots(curves, metric) + assigned_plots(summary, runs)
    (out / PLOTS).mkdir(exist_ok=True)
    for plot in plots:
        (out / PLOTS / f"{plot.key}.png").write_bytes(plot.png)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "seconds": human_seconds}
    page = environment.get_template("report.html.j2").render(
        summary=summary,
        metric=metric,
        runs=runs,
        curves=curves,
        plots=plots,
        swatch=swatch,
        headline=headline(runs, metric, summary.seed),
        reference=reference.entry.name,
        differences=differences,
        devices=dict(sorted(item for curve in curves for item in curve.examples.items())),
        device_rows=DEVICE_ROWS,
        draws=DRAWS,
        fewest=FEWEST,
    )
    path = out / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def assigned_plots(summary: Summary, runs: Sequence[Run]) -> list[Plot]:
    """A picture for each run whose strategy treated devices unlike."""
    plots = []
    for run in (run for run in runs if run.assigned):
        devices = sorted({*run.devices, *(name for table in run.assigned.values() for name in table)})
        known = len(devices) == summary.devices  # else a device's number in the fleet is not known
        kinds = (summary.profiles, summary.memory_mb) if known else ([], [])
        key = "assigned" if len(runs) == 1 else f"assigned-{runs.index(run)}"
        plots.append(draw_assigned(rows_of(run.assigned, devices, *kinds), run.entry.name, key=key))
    return plots


def read_finished(out: Path) -> tuple[Summary, list[Run]]:
    """The summary of a finished run, and each of its strategies' evaluated rounds.

    Raises:
        ValueError: as `write_report`.
    """
    path = out / "summary.json"
    summary = _parse(Summary, _read(out, path), path, out)
    if not summary.strategies:
        raise ValueError(f"{out} is not a finished run: {path} must list a strategy, got none")
    if odd := [entry.name for entry in summary.strategies if entry.metric != summary.metric]:
        raise ValueError(f"strategies of one report must all be judged by {summary.metric!r}, got others for {odd}")
    return summary, [_read_run(entry, out, summary.metric) for entry in summary.strategies]


def _read_run(entry: Entry, out: Path, metric: str) -> Run:
    path = out / entry.folder / "metrics.jsonl"
    lines = _read(out, path).splitlines()
    if lines and not _is_json(lines[-1]):
        lines.pop()  # cut short by a crash; the rounds before it stand
    records = [_parse(Record, line, f"{path} line {number}", out) for number, line in enumerate(lines, start=1)]
    evaluated = [record for record in records if record.devices]
    if not evaluated:
        raise ValueError(f"{out} is not a finished run: an evaluated round is missing in {path}")
    for record in evaluated:
        needed = {"n", "tokens", "loss_sum", _numerator(metric)}
        for device, measured in record.devices.items():
            if lacking := sorted(needed - set(measured)):
                where = f"{path} round {record.round}"
                raise ValueError(f"{out} is not a finished run: {lacking[0]!r} of {device!r} is missing in {where}")
    given = {record.round: record.assigned for record in records if record.assigned}
    return Run(entry=entry, records=evaluated, rounds=max(1, records[-1].round), assigned=given)


def _read(out: Path, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        raise ValueError(f"{out} is not a finished run: {path} is missing") from None
    except UnicodeDecodeError:
        raise ValueError(f"{out} is not a finished run: {path} must be UTF-8 text, got other bytes") from None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _parse(model: type[Parsed], text: str, where: Path | str, out: Path) -> Parsed:
    try:
        return model.model_validate(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{out} is not a finished run: {where} is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = repr(".".join(str(part) for part in first["loc"])) + " " if first["loc"] else ""
        problem = "is missing" if first["type"] == "missing" else f"{first['msg'].lower()}, got {first['input']!r:.60}"
        raise ValueError(f"{out} is not a finished run: {key}{problem} in {where}") from None


def _numerator(metric: str) -> str:
    return "token_hits" if metric == "token_accuracy" else f"{metric}_sum"


def _denominator(metric: str) -> str:
    return "tokens" if metric in ("loss", "token_accuracy") else "n"


def _curve(run: Run, metric: Metric, seed: int) -> Curve:
    key, first, last = metric.key, run.records[0], run.records[-1]
    measured = [[dict(record.devices[name]) for name in sorted(record.devices)] for record in run.records]
    bands = [interval(devices, key, seed=seed) for devices in measured]
    return Curve(
        name=run.entry.name,
        rounds=[record.round for record in run.records],
        metric=[pool(devices)[key] for devices in measured],
        low=[low for low, _ in bands],
        high=[high for _, high in bands],
        loss=[pool(devices)["loss"] for devices in measured],
        traffic=[float(record.bytes_up + record.bytes_down) for record in run.records],
        before={name: pool([sums])[key] for name, sums in first.devices.items()},
        after={name: pool([sums])[key] for name, sums in last.devices.items()},
        examples={name: int(sums["n"]) for name, sums in last.devices.items()},
        up=run.entry.bytes_up_per_device,
        down=run.entry.bytes_down_per_device,
    )


def paired_interval(first: Table, second: Table, metric: str, *, seed: int, share: float = 0.95) -> list[float]:
    """Percentile bootstrap over devices of (pooled metric of `second`) - (that of `first`).

    Each draw takes whole devices, and the same ones for both: what makes a device easy or hard falls out of the
    difference, so less is needed to tell two apart than their own intervals suggest (Efron and Tibshirani 1993, ch. 8).

    Returns:
        [low, high]; the difference twice for a single device.

    Raises:
        ValueError: when no device measured both.
    """
    sums, counts = _columns(first, second, metric)
    generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "paired bootstrap", metric)))
    devices = sums.shape[1]
    draws = generator.integers(0, devices, size=(DRAWS, devices))
    pooled = sums[:, draws].sum(axis=2) / counts[:, draws].sum(axis=2)
    differences = pooled[1] - pooled[0]
    tail = (1 - share) / 2
    return [float(np.quantile(differences, tail)), float(np.quantile(differences, 1 - tail))]


def paired_difference(first: Table, second: Table, metric: str) -> float:
    """(Pooled metric of `second`) - (that of `first`), over the devices that measured both.

    Raises:
        ValueError: when there are none.
    """
    sums, counts = _columns(first, second, metric)
    of_first, of_second = sums.sum(axis=1) / counts.sum(axis=1)
    return float(of_second - of_first)


def _columns(first: Table, second: Table, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums and counts, each 2 by devices: of both, for the devices with examples in both, in order of names."""
    over, under = _numerator(metric), _denominator(metric)
    names = [name for name in sorted(set(first) & set(second)) if first[name][under] and second[name][under]]
    if not names:
        raise ValueError(
            f"two strategies are compared over devices that both measured, got {len(first)} and "
            f"{len(second)} devices with none in common"
        )
    return (
        np.array([[table[name][over] for name in names] for table in (first, second)], dtype=float),
        np.array([[table[name][under] for name in names] for table in (first, second)], dtype=float),
    )


def _difference(reference: Run, run: Run, metric: Metric, seed: int) -> Difference:
    shared = len(set(reference.devices) & set(run.devices))
    if not shared:
        nan = float("nan")
        return Difference(name=run.entry.name, value=nan, low=nan, high=nan, devices=0, reading="no device in common")
    value = paired_difference(reference.devices, run.devices, metric.key)
    low, high = paired_interval(reference.devices, run.devices, metric.key, seed=seed)
    reading = "too little to tell them apart"
    if shared < FEWEST:
        reading = "too few devices to tell them apart"
    elif low > 0 or high < 0:
        reading = "better" if (low > 0) == metric.is_share else "worse"
    return Difference(name=run.entry.name, value=value, low=low, high=high, devices=shared, reading=reading)


def headline(runs: Sequence[Run], metric: Metric, seed: int) -> str:
    """Who ended where, and for how many bytes, in a sentence or two."""
    ranked = sorted(runs, key=lambda run: _rank(run, metric))
    best = ranked[0]
    fleet = f"after {plural(best.rounds, 'round')} on {plural(len(best.devices), 'device')}"
    if len(runs) == 1:
        return f"{best.entry.name} ended at {_ending(best, metric)}, {fleet}, {_cost(best)}."
    second = ranked[1]
    difference = _difference(second, best, metric, seed)
    verdict = "enough to tell them apart" if difference.reading in ("better", "worse") else difference.reading
    unit = " points" if metric.is_share else ""
    end = "highest" if metric.is_share else "lowest"
    text = f"{best.entry.name} ended {end}, at {_ending(best, metric)}, {fleet}, {_cost(best)}. "
    text += f"Next came {second.entry.name} at {_ending(second, metric)}, {_cost(second)}"
    if difference.devices:
        text += f"; paired, the two differ by {metric.signed(difference.value)}{unit}: {verdict}"
    default = next((run for run in ranked[2:] if run.entry.name == "fedloom"), None)
    return f"{text}." + (f" fedloom ended at {_ending(default, metric)}, {_cost(default)}." if default else "")


def _rank(run: Run, metric: Metric) -> float:
    """Lower is better; a run that diverged comes last."""
    after = run.entry.after
    return float("inf") if np.isnan(after) else -after if metric.is_share else after


def _ending(run: Run, metric: Metric) -> str:
    entry = run.entry
    low, high = (metric.text(bound) for bound in entry.ci95)
    name = metric.title if metric.key == "rouge_l" else metric.title.lower()
    return f"{metric.text(entry.after)} {name} (95% interval {low} to {high}), from {metric.text(entry.before)}"


def _cost(run: Run) -> str:
    return f"with {human_bytes(run.entry.bytes_up)} up and {human_bytes(run.entry.bytes_down)} down in all"
