"""events.jsonl: what happens in a run as it happens, one JSON object a line, for whoever looks on from outside.

Every line has `time` (Unix seconds) and `event`: joined, left_out, started, phase, answer, unneeded, quarantined,
round, finished, stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.protocols.messages import DeviceReport

EVENTS_FILE = "events.jsonl"


class EventLog:
    """A watcher that appends to a file; lines are whole once the call returns, but for a crash."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell():
            self._file.write("\n")  # a crash may have cut the last line

    def started(self, *, run: str, name: str, strategy: str, round: int, rounds: int, devices: Sequence[str]) -> None:
        told = {"run": run, "name": name, "strategy": strategy, "round": round, "rounds": rounds}
        self._write("started", **told, devices=list(devices))

    def joined(self, *, report: DeviceReport) -> None:
        self._write(
            "joined",
            device=report.device,
            software=report.software,
            examples=report.examples,
            rank=report.rank,
            capabilities=list(report.capabilities),
        )

    def began(self, *, round: int, rounds: int, phase: str, devices: Sequence[str]) -> None:
        self._write("phase", round=round, rounds=rounds, phase=phase, devices=list(devices))

    def left_out(self, *, device: str, reason: str) -> None:
        self._write("left_out", device=device, reason=reason)

    def answered(
        self, *, round: int, phase: str, device: str, size: int, down: int, seconds: float, refused: str
    ) -> None:
        self._write(
            "answer",
            round=round,
            phase=phase,
            device=device,
            bytes=size,
            down=down,
            seconds=float(f"{seconds:.3f}"),
            refused=refused,
        )

    def unneeded(self, *, round: int, phase: str, device: str, down: int) -> None:
        self._write("unneeded", round=round, phase=phase, device=device, down=down)

    def rested(self, *, device: str, until: int, reason: str) -> None:
        self._write("quarantined", device=device, until=until, reason=reason)

    def ended(self, *, record: Mapping[str, Any]) -> None:
        self._write("round", round=record["round"], record=dict(record))

    def finished(self) -> None:
        self._write("finished")

    def stopped(self, reason: str) -> None:
        self._write("stopped", reason=reason)

    def close(self) -> None:
        self._file.close()

    def _write(self, event: str, **about: Any) -> None:
        self._file.write(json.dumps({"time": time.time(), "event": event, **about}) + "\n")
        self._file.flush()
