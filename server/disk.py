"""Files that are whole or not there at all, and on the disk when the call returns."""

from __future__ import annotations

import os
from pathlib import Path


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


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place, flush it and rename it: a reader sees the old one or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    write_flushed(draft, data)
    os.replace(draft, path)
    flush_folder(path.parent)
