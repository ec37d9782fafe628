"""Files that are whole or not there at all, and on the disk when the call returns."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
LEAST_ROOM: Final = 2 * 2**20  # bytes free under a run: with less, whatever writes next breaks down in its own way


@contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """Say in one line what to do when the disk is full.

    Raises:
        ValueError: in place of the block's OSError, where that says so.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ValueError(_full(folder, str(error.strerror))) from None


def check_room(folder: Path) -> None:
    """Raise ValueError for a disk that is as good as full."""
    free = shutil.disk_usage(folder).free
    if free < LEAST_ROOM:
        raise ValueError(_full(folder, f"{free / 1e6:.1f} MB free"))


def _full(folder: Path, got: str) -> str:
    return (
        f"{folder} must have room for the run's files, got {got}: make room and start again, "
        "nothing that was finished is lost"
    )


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
    try:
        write_flushed(draft, data)
        os.replace(draft, path)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)  # on a full disk, half a file is in everyone's way
        raise
    flush_folder(path.parent)


def write_anyhow(path: Path, data: bytes) -> None:
    """Write a small file whole or, where the disk has no room for two of it, over the old one's bytes.

    For what a process must be able to say on a full disk: that it is full. A reader may then see half of it once.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        with path.open("r+b") as file:
            file.write(data)
            file.truncate()
