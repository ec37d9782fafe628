"""Running a recipe on pretend devices, and what a finished run leaves in its folder.

OUT/recipe.json      the recipe as it ran
OUT/summary.json     one entry per strategy: metric before and after with its interval, bytes, seconds, memory
OUT/[LABEL/]         for each strategy: metrics.jsonl, tensorboard/, checkpoints/, devices/ (what devices keep)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedloom.client import tuners
from fedloom.protocols.config import RunConfig, build_config, contenders
from fedloom.server.app import Plan, build_strategy, coordinate
from fedloom.server.pooling import interval, pool
from fedloom.server.track import METRICS_FILE
from fedloom.server.watch import Watcher
from fedloom.simulations.fleet import Fleet
from fedloom.simulations.grid import InProcessGrid, pretend_nodes
from fedloom.simulations.world import pretend_app

RECIPE_FILE = "recipe.json"
SUMMARY_FILE = "summary.json"
_NOT_THE_RESULT = {"about", "compare", "simulation", "track", "name"}  # keys that change no number of a run

WatcherFor = Callable[[str, RunConfig], Watcher]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a recipe: its label, its own recipe and its folder."""

    label: str
    config: RunConfig
    folder: Path


def run_name(config: RunConfig) -> str:
    """A name that two recipes share only if they give the same run, whatever the number of rounds or workers.

    A learning rate that falls over the rounds makes their number part of the run.
    """
    table = config.model_dump(mode="json", exclude=_NOT_THE_RESULT)
    if config.train.schedule == "constant":
        del table["server"]["rounds"]
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def members(config: RunConfig, out: Path) -> list[Member]:
    """The runs that a recipe stands for, each with its folder: OUT itself, or OUT/LABEL in a comparison."""
    alone = not config.compare
    return [
        Member(label=label, config=each, folder=out if alone else out / label) for label, each in contenders(config)
    ]


def open_folder(config: RunConfig, out: Path, *, resume: bool, force: bool) -> None:
    """Make a run's folder ready, or take it up again.

    Raises:
        ValueError: when it holds a run and neither `resume` nor `force` is given, or a different run than the recipe's,
            or something that is no run at all.
    """
    existing = out / RECIPE_FILE
    if existing.exists() and not any(out.rglob("round-*/run.json")):
        shutil.rmtree(out)  # a run that failed before its first checkpoint holds nothing to keep
    elif existing.exists():
        if not (resume or force):
            raise ValueError(f"{out} already holds a run: give --resume to go on with it or --force to start it over")
        if force:
            shutil.rmtree(out)
        else:
            earlier = read_run(out)
            if [run_name(c) for _, c in contenders(earlier)] != [run_name(c) for _, c in contenders(config)]:
                raise ValueError(f"{out} holds a run of another recipe: resume with the recipe it began with")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} must be empty or hold a run, got a folder with other files")
    out.mkdir(parents=True, exist_ok=True)
    existing.write_text(json.dumps(config.model_dump(mode="json"), indent=1), encoding="utf-8")


def read_run(out: Path) -> RunConfig:
    """The recipe of the run in a folder.

    Raises:
        ValueError: when there is none.
    """
    try:
        return build_config(json.loads((out / RECIPE_FILE).read_text(encoding="utf-8")))
    except OSError:
        raise ValueError(f"{out} is not a run: it has no {RECIPE_FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{out / RECIPE_FILE} is not JSON: {error}") from None


def run_recipe(
    config: RunConfig, out: Path, *, resume: bool = False, force: bool = False, watch: WatcherFor | None = None
) -> dict[str, Any]:
    """Run every member of a recipe, write OUT/summary.json and return it.

    Raises:
        ValueError: for anything that the recipe, its data or the folder gets wrong.
    """
    everyone = members(config, out)
    for member in everyone:
        _preflight(member.config)
    open_folder(config, out, resume=resume, force=force)
    entries = [_run_member(member, out, resume=resume, watch=watch) for member in everyone]
    summary = {
        "name": config.name,
        "about": config.about,
        "model": config.model.path,
        "devices": config.fleet.devices,
        "ranks": list(config.fleet.ranks),
        "profiles": list(config.fleet.profiles),
        "memory_mb": list(config.fleet.memory_mb),
        "rounds": config.server.rounds,
        "seed": config.seed,
        "metric": main_metric(config),
        "machine": {"cpu": _processor(), "cores": os.cpu_count() or 1, "torch": torch.__version__},
        "strategies": entries,
    }
    (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


def _preflight(config: RunConfig) -> None:
    """Raise what can be known to be wrong before a folder is touched or a device is started."""
    build_strategy(config)
    if config.train.tuner != "auto":
        tuners.known(config.train.tuner)
    Fleet(config)


def main_metric(config: RunConfig) -> str:
    """What a recipe's runs are judged by."""
    if config.eval.metric != "auto":
        return config.eval.metric
    return "accuracy" if config.model.task == "classify" else "exact_match"


def _run_member(member: Member, out: Path, *, resume: bool, watch: WatcherFor | None) -> dict[str, Any]:
    config, work = member.config, member.folder / "devices"
    member.folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(config=config, out=member.folder, run=run_name(config), resume=resume)
    nodes = pretend_nodes(config.fleet.devices)
    began = time.monotonic()
    with InProcessGrid(
        nodes, pretend_app, (config, work), workers=config.simulation.workers, threads=config.simulation.threads
    ) as grid:
        coordinate(grid, plan, watch(member.label, config) if watch else None)
    if not config.simulation.keep_devices:
        shutil.rmtree(work / "patches", ignore_errors=True)
    records = read_metrics(member.folder / METRICS_FILE)
    return _entry(member, out, records, config) | {"wall_seconds": time.monotonic() - began}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """A run's records in order of rounds.

    Raises:
        ValueError: when the file is missing.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        raise ValueError(f"{path.parent} is not a finished run: {path.name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold one JSON object a line: {error}") from None
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} must hold one JSON object a line")
    return records


def _entry(member: Member, out: Path, records: list[dict[str, Any]], config: RunConfig) -> dict[str, Any]:
    """One line of the summary."""
    metric, first, last = main_metric(config), records[0], records[-1]
    before, after = _devices(first), _devices(last)
    count = config.fleet.devices
    return {
        "name": member.label,
        "strategy": config.strategy.name,
        "folder": member.folder.relative_to(out).as_posix(),
        "metric": metric,
        "before": pool(before)[metric],
        "after": pool(after)[metric],
        "ci95_before": interval(before, metric, seed=config.seed),
        "ci95": interval(after, metric, seed=config.seed),
        "loss_before": pool(before)["loss"],
        "loss_after": pool(after)["loss"],
        "bytes_up": last["bytes_up"],
        "bytes_down": last["bytes_down"],
        "bytes_evaluation": last["bytes_evaluation"],
        "bytes_up_per_device": last["bytes_up"] / count,
        "bytes_down_per_device": last["bytes_down"] / count,
        "seconds": sum(record["seconds"] for record in records),
        "device_seconds": sum(record.get("device_seconds", 0.0) for record in records),
        "peak_rss_mb": max(record.get("device_peak_mb", 0.0) for record in records),
        "refused": last["refused"],
        **_virtual(records, config),
    }


def _virtual(records: list[dict[str, Any]], config: RunConfig) -> dict[str, float]:
    """What the rounds took on the devices' own clock, and how long devices waited in all; only where there is one."""
    if not config.fleet.profiles:
        return {}
    keys = {"virtual_seconds": "slowest_seconds", "idle_seconds": "idle_seconds"}
    return {name: sum(record.get(key, 0.0) for record in records) for name, key in keys.items()}


def _devices(record: Mapping[str, Any]) -> list[dict[str, float]]:
    return [dict(metrics) for _, metrics in sorted(record["devices"].items())]


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
