"""The log of everything that left the device: one JSON object a line, on disk before the first byte goes out.

    {"time": "2026-01-31T22:04:05+01:00", "kind": "train", "run": "a1b2...", "round": 3, "bytes": 12345,
     "digest": "...", "what": {"tensors": {"model.layers.0.mlp.up_proj": [[64, 8], [8, 64]]}, "dtype": "bf16",
     "metrics": ["loss_sum", "tokens"], "examples": 120}, "again": false}

It is only ever appended to. A full file is set aside under the next number, and nothing here deletes one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, Final

_NAME: Final = "outbox"
_ROTATE: Final = 8 * 2**20  # bytes


class Outbox:
    """The log of one device; entries may come from several threads."""

    def __init__(self, folder: Path, *, rotate: int = _ROTATE) -> None:
        self.folder, self._rotate, self._lock = folder, rotate, Lock()

    @property
    def _path(self) -> Path:
        return self.folder / f"{_NAME}.jsonl"

    def note(self, entry: Mapping[str, Any]) -> None:
        """Write an entry, with the time; it is on disk when this returns.

        Raises:
            OSError: where the disk fails: what is not logged must not leave.
        """
        line = json.dumps({"time": datetime.now().astimezone().isoformat(timespec="seconds"), **entry}) + "\n"
        with self._lock:
            self._make_room(len(line))
            with os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
                if file.seek(0, os.SEEK_END) and not _ends_well(file.fileno()):
                    line = "\n" + line  # a killed process left half a line
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())

    def _make_room(self, size: int) -> None:
        try:
            full = self._path.stat().st_size + size > self._rotate
        except FileNotFoundError:
            return
        if full:
            numbers = [number for number, _ in _set_aside(self.folder)]
            self._path.rename(self.folder / f"{_NAME}-{max(numbers, default=0) + 1}.jsonl")


def entries(folder: Path) -> Iterator[dict[str, Any]]:
    """All entries in a state folder, oldest first; half a line that a killed process left is skipped."""
    files = [path for _, path in sorted(_set_aside(folder))] + [folder / f"{_NAME}.jsonl"]
    for path in files:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        entry = json.loads(line)
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(entry, dict):
                        yield entry
        except FileNotFoundError:
            continue


def _set_aside(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob(f"{_NAME}-*.jsonl"):
        number = path.stem.removeprefix(f"{_NAME}-")
        if number.isdecimal():
            found.append((int(number), path))
    return found


def _ends_well(handle: int) -> bool:
    """Whether a file that is not empty ends in a newline."""
    return os.pread(handle, 1, os.fstat(handle).st_size - 1) == b"\n"
