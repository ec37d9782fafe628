"""Bytes of messages that came and went today, on disk, so that a restart does not begin the day again."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from threading import Lock

from fedloom.client.tensorfile import write_whole


class Traffic:
    """A day's counter. The day is the local one; a clock set back goes on with the day it comes to."""

    def __init__(self, path: Path, today: Callable[[], date] = date.today) -> None:
        self._path, self._today, self._lock = path, today, Lock()
        self._day, self._up, self._down = _read(path)

    def add(self, *, up: int = 0, down: int = 0) -> None:
        """Count bytes, on disk before this returns."""
        with self._lock:
            self._turn()
            self._up, self._down = self._up + up, self._down + down
            write_whole(self._path, json.dumps({"day": self._day, "up": self._up, "down": self._down}).encode())

    def now(self) -> dict[str, int | str]:
        """`day`, and the bytes `up` and `down` of it."""
        with self._lock:
            self._turn()
            return {"day": self._day, "up": self._up, "down": self._down}

    def total(self) -> int:
        """Bytes both ways today."""
        with self._lock:
            self._turn()
            return self._up + self._down

    def _turn(self) -> None:
        day = self._today().isoformat()
        if day != self._day:
            self._day, self._up, self._down = day, 0, 0


def _read(path: Path) -> tuple[str, int, int]:
    """The counter as it was left; a fresh one where there is none, or none that can be read."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return str(noted["day"]), max(int(noted["up"]), 0), max(int(noted["down"]), 0)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return "", 0, 0
