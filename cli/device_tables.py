"""A device's status and its log of what left it, as tables for its owner."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedloom.cli.console import clean
from fedloom.cli.tables import show
from fedloom.client.agent.calls import Status
from fedloom.server.units import human_bytes

_COLOURS = {"idle": "green", "train": "cyan", "evaluate": "cyan", "paused": "yellow", "loading": "yellow"}


def show_status(console: Console, status: Status) -> None:
    """A table of what the agent says of itself."""
    details = status.details
    table = Table(title=f"{status.device}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    colour = _COLOURS.get(status.state, "red")
    table.add_row("state", f"[{colour}]{status.state}[/] since its start {_ago(details['since'])}")
    for name, value in _rows(status, details):
        table.add_row(name, escape(clean(value)))
    console.print(table)


def _rows(status: Status, details: Mapping[str, Any]) -> list[tuple[str, str]]:
    progress, tasks, traffic = status.progress, details["tasks"], details["traffic"]
    rows = []
    if progress.kind:
        steps = f", step {progress.step}/{progress.of}, loss {progress.loss:.3f}" if progress.of else ""
        rows.append(("task", f"{progress.kind}, round {progress.round}{steps}, {progress.seconds:.1f} s"))
    told = f"{tasks['answered']} answered, {tasks['refused']} refused, {tasks['again']} sent again"
    rows.append(("tasks", f"{told}, {details['waiting']} waiting"))
    if status.last_error:
        rows.append(("last error", status.last_error))
    rows.append(("rules", details["rules"] or "may work now"))
    if link := details["link"]:
        here = f"connected {_ago(link['since'])}" if link["connected"] else link["problem"] or "connecting"
        rows.append(("server", f"{link['server']}: {here}"))
    limit = f" of {traffic['limit_mb']} MB" if traffic["limit_mb"] else ""
    rows.append(("today", f"{human_bytes(traffic['up'])} up, {human_bytes(traffic['down'])} down{limit}"))
    if about := details["device"]:
        rows.append(("model", f"{details['model']}, base {about['base'][:12]}, {about['software']}"))
        rows.append(
            ("device", f"{about['examples']} examples, rank {about['rank']}, {'/'.join(about['capabilities'])}")
        )
    rows.append(("memory", f"{details['memory_mb']:.0f} MB in processes {details['process']} and its model's"))
    rows.append(("state folder", str(details["state_folder"])))
    return rows


def show_log(console: Console, entries: Sequence[Mapping[str, Any]], tail: int) -> None:
    """The newest `tail` entries (0: all), and the sum of all."""
    shown = entries[-tail:] if tail else entries
    rows = [
        (
            str(entry.get("time", ""))[:19].replace("T", " "),
            clean(str(entry.get("kind", ""))),
            clean(str(entry.get("run", ""))[:8]),
            str(entry.get("round", "")),
            human_bytes(entry.get("bytes", 0)),
            escape(clean(_what(entry))),
        )
        for entry in shown
    ]
    title = f"The last {len(shown)} of {len(entries)} messages that left this device"
    show(console, title, ("time", "kind", "run", "round", "size", "what"), rows)
    console.print(f"{human_bytes(sum(entry.get('bytes', 0) for entry in entries))} in all", highlight=False)


def _what(entry: Mapping[str, Any]) -> str:
    """An entry's content in a few words; `--json` has all of it."""
    what = entry.get("what") or {}
    if "refused" in what:
        return str(what["refused"])
    told = []
    if tensors := what.get("tensors"):
        numbers = sum(_size(shape) for shapes in tensors.values() for shape in shapes)
        told.append(f"{numbers:,} numbers of {len(tensors)} tensors as {what.get('dtype')}")
    if "scalars" in what:
        told.append(f"{what['scalars']} scalars over {what.get('of')}")
    if metrics := what.get("metrics"):
        told.append(f"metrics {', '.join(metrics)}")
    if entry.get("kind") == "hello":
        told.append("who it is: " + ", ".join(sorted(what)))
    return "; ".join(told) + (" (sent again)" if entry.get("again") else "")


def _size(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
