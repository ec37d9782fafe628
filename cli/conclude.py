"""What a deployed run leaves behind when it is finished: the same summary, report and adapter as a simulated one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedloom.cli.finish import finish
from fedloom.protocols.config import RunConfig
from fedloom.server.events import EVENTS_FILE
from fedloom.server.track import METRICS_FILE
from fedloom.simulations.report import REPORT_FILE
from fedloom.simulations.runs import members
from fedloom.simulations.summary import SUMMARY_FILE, entry, read_metrics, write_summary


def conclude(config: RunConfig, out: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Write summary.json, the report and, where this machine has the base model, the adapter.

    Returns:
        the summary, and what lies where.

    Raises:
        ValueError: when the first or the last round was evaluated by no device, so that there is nothing to compare.
    """
    records = read_metrics(out / METRICS_FILE)
    for record in (records[0], records[-1]):
        if not record.get("devices"):
            raise ValueError(f"{out} has no summary: no device evaluated the model in round {record['round']}")
    ranks = _ranks(out)
    sized = config.model_copy(
        update={"fleet": config.fleet.model_copy(update={"devices": len(records[-1]["devices"]), "ranks": ranks})}
    )
    summary = write_summary(out, sized, [entry(members(config, out)[0].label, Path("."), records, sized)])
    try:
        written = finish(config, out)
    except (ValueError, OSError) as error:  # most often: the base model is with the devices, not here
        why = str(error).partition("\n")[0]
        written = {"summary": str(out / SUMMARY_FILE), "report": str(out / REPORT_FILE)}
        written["adapter"] = f"fedloom export {out}, once this is so: {why}"
    return summary, written


def _ranks(out: Path) -> tuple[int, ...]:
    """The rank of each device that ever joined, in name order."""
    ranks: dict[str, int] = {}
    for line in (out / EVENTS_FILE).read_text(encoding="utf-8").splitlines():
        event = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
        if event.get("event") == "joined":
            ranks[event["device"]] = event["rank"]
    return tuple(rank for _, rank in sorted(ranks.items()))
