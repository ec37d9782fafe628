"""Files that are whole or not there at all, and on the disk when the call returns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_flushed(path: Path, data: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Wait until the disk has a folder's entries, such as a rename in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sealed(table: Mapping[str, Any]) -> bytes:
    """A table as JSON that carries its own SHA-256, so that a damaged one is noticed."""
    return json.dumps({**table, "seal": _digest(table)}, indent=1, sort_keys=True).encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """The table that `sealed` wrote.

    Raises:
        ValueError: for anything else.
    """
    try:
        table = json.loads(data)
    except RecursionError:
        table = None
    if not isinstance(table, dict):
        raise ValueError("it must be a JSON object")
    seal = str(table.pop("seal", "missing"))
    if (digest := _digest(table)) != seal:
        raise ValueError(f"its seal must be {digest[:12]}, got {seal[:12]!r}")
    return table


def _digest(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it and rename it: a reader sees the old one or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    write_flushed(draft, data)
    os.replace(draft, path)
    flush_folder(path.parent)
