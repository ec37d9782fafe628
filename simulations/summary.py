"""The summary of finished runs: how good each became, with its interval, and what it cost."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedloom.protocols.config import RunConfig
from fedloom.server.pooling import interval, pool
from fedloom.simulations.clock import elapsed
from fedloom.simulations.naming import main_metric

SUMMARY_FILE = "summary.json"


def write_summary(out: Path, config: RunConfig, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write OUT/summary.json and return it; `config` names the devices and ranks that took part."""
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
        "strategies": list(entries),
    }
    (out / SUMMARY_FILE).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return summary


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


def entry(label: str, folder: Path, records: Sequence[Mapping[str, Any]], config: RunConfig) -> dict[str, Any]:
    """What a summary says of one run.

    Args:
        label: its name in a comparison.
        folder: where it lies, relative to the summary.
        records: one per round, the first from before training.
        config: its recipe, with the devices that took part.
    """
    metric, first, last = main_metric(config), records[0], records[-1]
    before, after = _devices(first), _devices(last)
    count = config.fleet.devices
    return {
        "name": label,
        "strategy": config.strategy.name,
        "folder": folder.as_posix(),
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


def _virtual(records: Sequence[Mapping[str, Any]], config: RunConfig) -> dict[str, float]:
    """What the rounds took on the devices' own clock, and how long devices waited in all; only where there is one."""
    return elapsed(records) if config.fleet.profiles else {}


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
