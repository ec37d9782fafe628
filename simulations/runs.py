"""Running a recipe on pretend devices, and what a finished run leaves in its folder.

OUT/recipe.json      the recipe as it ran
OUT/summary.json     one entry per strategy: metric before and after with its interval, bytes, seconds, memory
OUT/[LABEL/]         for each strategy: metrics.jsonl, tensorboard/, checkpoints/, devices/ (what devices keep)
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.client import tuners
from fedloom.protocols.config import RunConfig, build_config, contenders
from fedloom.server.app import Plan, build_strategy, coordinate
from fedloom.server.track import METRICS_FILE
from fedloom.server.watch import Watcher
from fedloom.simulations.fleet import Fleet
from fedloom.simulations.grid import InProcessGrid, pretend_nodes
from fedloom.simulations.naming import run_name
from fedloom.simulations.summary import entry, read_metrics, write_summary
from fedloom.simulations.world import pretend_app

RECIPE_FILE = "recipe.json"

WatcherFor = Callable[[str, RunConfig], Watcher]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a recipe: its label, its own recipe and its folder."""

    label: str
    config: RunConfig
    folder: Path


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
    return write_summary(out, config, entries)


def _preflight(config: RunConfig) -> None:
    """Raise what can be known to be wrong before a folder is touched or a device is started."""
    build_strategy(config)
    if config.train.tuner != "auto":
        tuners.known(config.train.tuner)
    Fleet(config)


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
    return entry(member.label, member.folder.relative_to(out), records, config) | {
        "wall_seconds": time.monotonic() - began
    }
