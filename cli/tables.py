"""Tables for people, the same rows as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fedloom.server.units import human_bytes


def show(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is a name."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, style="bold" if index == 0 else "")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_or_json(
    console: Console, as_json: bool, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table, or with `as_json` a list of objects keyed by the columns."""
    if as_json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1))
    else:
        show(console, title, columns, rows)


def show_ending(console: Console, summary: Mapping[str, Any], written: Mapping[str, str], *, as_json: bool) -> None:
    """What ends a run: how good each strategy became, what it cost, and what lies where."""
    if as_json:
        print(json.dumps({**summary, "files": dict(written)}, indent=1))
        return
    _show_summary(console, summary)
    for what, where in written.items():
        console.print(f"{what:<8} {where}", highlight=False, soft_wrap=True)


def _show_summary(console: Console, summary: Mapping[str, Any]) -> None:
    metric = str(summary["metric"]).replace("_", " ")
    good, cost, clocked = [], [], any("virtual_seconds" in entry for entry in summary["strategies"])
    for entry in summary["strategies"]:
        low, high = entry["ci95"]
        good.append(
            (
                entry["name"],
                f"{entry['before']:.3f}",
                f"{entry['after']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{entry['loss_before']:.2f} → {entry['loss_after']:.2f}",
            )
        )
        cost.append(
            (
                entry["name"],
                human_bytes(entry["bytes_up"]),
                human_bytes(entry["bytes_up_per_device"]),
                human_bytes(entry["bytes_down"]),
                human_bytes(entry["bytes_down_per_device"]),
                f"{entry['seconds']:.0f} s",
                f"{entry['peak_rss_mb']:.0f} MB",
                *((f"{entry[key]:.1f} s" for key in ("virtual_seconds", "idle_seconds")) if clocked else ()),
            )
        )
    size = f"{summary['devices']} devices, {summary['rounds']} rounds"
    show(console, f"{summary['name']}: {size}", ("strategy", f"{metric} before", "after", "95% interval", "loss"), good)
    columns = ("strategy", "up", "each", "down", "each", "time", "peak memory")
    show(console, "what it cost", columns + (("virtual time", "idle in all") if clocked else ()), cost)
