"""A run's folder, read as it fills: the two logs line by line, the recipe and the plan whenever they change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloom.server.dashboard.fields import DEVICE_LIMIT, clean, names_of, number_of, table_of, text_of
from fedloom.server.dashboard.rounds import Rounds, read_round
from fedloom.server.dashboard.state import RunState
from fedloom.server.dashboard.tail import Tail
from fedloom.server.events import EVENTS_FILE
from fedloom.server.track import METRICS_FILE

TABLE_LIMIT = 2**20
RECIPE_FILE, PLAN_FILE = "recipe.json", "plan.json"
PATIENCE, MARGIN = 3600.0, 60.0  # seconds: a recipe's default timeout, and what a round may take beside its answers


class Table:
    """A JSON object in a file that is written whole; the last good one while it is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self.value: Mapping[str, Any] = {}

    def refresh(self) -> bool:
        """Read it again where it has changed; whether there is a new value.

        Raises:
            OSError: when it is there and cannot be read.
        """
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._stamp or status.st_size > TABLE_LIMIT:
                return False
            value = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return False
        self._stamp = stamp
        self.value = value if isinstance(value, dict) else {}
        return True


class RunFolder:
    """What can be known of a run from outside.

    Attributes:
        unreadable: lines that are no events or records, such as one that a crash cut short.
        problem: why the folder cannot be read now; empty when it can.
    """

    def __init__(self, path: Path) -> None:
        self._events, self._metrics = Tail(path / EVENTS_FILE), Tail(path / METRICS_FILE)
        self._recipe, self._plan = Table(path / RECIPE_FILE), Table(path / PLAN_FILE)
        self._records = Rounds()
        self._wrong = 0
        self.run = RunState()
        self.problem = ""

    @property
    def unreadable(self) -> int:
        return self._wrong + self._events.overlong + self._metrics.overlong

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The run's recipe, as in recipe.json or in the plan; empty while there is neither."""
        return self._recipe.value or table_of(self._plan.value, "config")

    @property
    def names(self) -> list[str]:
        """Devices that the plan names."""
        try:
            return names_of(self._plan.value, "names", most=DEVICE_LIMIT)
        except ValueError:
            return []

    @property
    def wanted(self) -> int:
        """Devices that must be connected before the first round, 0 where that is not known."""
        return int(number_of(self._plan.value, "wait_for") or 0)

    @property
    def title(self) -> str:
        """The run's name."""
        try:
            return self.run.name or text_of(self.recipe, "name") or "Run"
        except ValueError:
            return "Run"

    @property
    def stale_after(self) -> float:
        """Seconds without an event after which a run is in trouble: what its recipe waits for answers, and more."""
        rules = table_of(self.recipe, "server")
        return (number_of(rules, "timeout") or PATIENCE) + (number_of(rules, "retry_seconds") or 0.0) + MARGIN

    def rounds(self) -> Rounds:
        """Finished rounds, from both logs."""
        return self.run.rounds.over(self._records)

    def poll(self) -> tuple[bool, bool]:
        """Read what has come; whether anything changed, and whether there is more to read at once."""
        before = self.problem
        try:
            changed = self._recipe.refresh() | self._plan.refresh()
            events, metrics = self._events.read(), self._metrics.read()
            self.problem = ""
        except OSError as error:
            self.problem = clean(f"the run's folder cannot be read: {error.strerror}")
            return self.problem != before, False
        if events.anew:
            self.run = RunState()
        if metrics.anew:
            self._records = Rounds()
        for line in events.lines:
            self._take(line, lambda table: self.run.apply(table))
        for line in metrics.lines:
            self._take(line, lambda table: self._records.add(read_round(table)))
        changed |= bool(events.lines or metrics.lines or events.anew or metrics.anew or before)
        return changed, events.more or metrics.more

    def _take(self, line: bytes, take: Callable[[Mapping[str, Any]], None]) -> None:
        try:
            table = json.loads(line)
            if not isinstance(table, dict):
                raise ValueError(f"a line must be a table, got {type(table).__name__}")
            take(table)
        except (ValueError, RecursionError):
            self._wrong += 1
