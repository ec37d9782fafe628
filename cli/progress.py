"""Progress bars for runs: one line per strategy, with the round, the phase and the newest metric."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fedloom.protocols.config import RunConfig
from fedloom.server.watch import Silent
from fedloom.simulations.naming import main_metric


class Board:
    """A live board of runs. On a terminal it moves; elsewhere (a log file, CI) it prints a line a round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Board:
        handler = RichHandler(console=self._console, show_path=False, show_time=False)
        logger = logging.getLogger("fedloom")
        logger.handlers = [handler]
        logger.setLevel(logging.WARNING)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def watch(self, label: str, config: RunConfig) -> Line:
        """A watcher that draws one run's line."""
        return Line(self._progress, self._console, label, main_metric(config))


class Line(Silent):
    """One run's line: its bar counts the tasks answered in the current phase of the current round."""

    def __init__(self, progress: Progress, console: Console, label: str, metric: str) -> None:
        self._progress, self._console, self._label, self._metric = progress, console, label, metric
        self._newest = ""
        self._task = progress.add_task(label, total=None, status="starting devices")

    def began(self, *, round: int, rounds: int, phase: str, devices: Sequence[str]) -> None:
        status = f"round {round}/{rounds} {phase}{self._newest}"
        self._progress.reset(self._task, start=False, total=len(devices), completed=0, status=status)
        self._progress.start_task(self._task)

    def answered(self, **about: Any) -> None:
        self._progress.advance(self._task)

    def ended(self, *, record: Mapping[str, Any]) -> None:
        evaluation = record.get("evaluation") or {}
        judged = f" · {self._metric} {evaluation[self._metric]:.3f}" if self._metric in evaluation else ""
        self._newest = judged or self._newest
        self._progress.update(self._task, status=f"round {record['round']} done{self._newest}")
        if not self._console.is_terminal:
            line = f"{self._label}: round {record['round']} done{judged} ({record['seconds']:.1f} s)"
            self._console.print(line, highlight=False)
