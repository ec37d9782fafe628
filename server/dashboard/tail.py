"""The lines of a file that another process writes, each once: a torn line is waited for, a new file starts over."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CHUNK = 2**20
LINE_LIMIT = 8 * 2**20
ANCHOR = 64  # bytes before the place read up to, by which a file that was written anew is told from one that grew


@dataclass(frozen=True, kw_only=True)
class Lines:
    """What one read found.

    Attributes:
        anew: the file is another one than at the last read, so that what was read before does not count.
        more: there is more to read at once.
    """

    lines: tuple[bytes, ...] = ()
    anew: bool = False
    more: bool = False


class Tail:
    """Where in a file the reader stands. Memory is bounded by one chunk and one line.

    Attributes:
        overlong: lines above the limit, which were left out.
    """

    def __init__(self, path: Path, *, limit: int = LINE_LIMIT) -> None:
        self._path, self._limit = path, limit
        self.overlong = 0
        self._start(None)

    def _start(self, identity: tuple[int, int] | None) -> None:
        self._identity, self._offset, self._anchor, self._rest, self._skipping = identity, 0, b"", b"", False

    def read(self) -> Lines:
        """The whole lines among the next bytes of the file; nothing while there is no file.

        Raises:
            OSError: when the file is there and cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                anew = self._identity is not None and self._is_another(file, identity, status.st_size)
                if anew or self._identity is None:
                    self._start(identity)
                file.seek(self._offset)
                data = file.read(CHUNK)
        except FileNotFoundError:
            return Lines()
        self._offset += len(data)
        self._anchor = (self._anchor + data)[-ANCHOR:]
        return Lines(lines=self._split(data), anew=anew, more=len(data) == CHUNK)

    def _is_another(self, file: BinaryIO, identity: tuple[int, int], size: int) -> bool:
        if identity != self._identity or size < self._offset:
            return True
        file.seek(self._offset - len(self._anchor))
        return file.read(len(self._anchor)) != self._anchor

    def _split(self, data: bytes) -> tuple[bytes, ...]:
        """Whole lines without their ends; the beginning of the next one is kept."""
        *lines, rest = (self._rest + data).split(b"\n")
        if lines and self._skipping:
            lines, self._skipping = lines[1:], False
        if len(rest) > self._limit:
            self.overlong += not self._skipping
            self._skipping = True
        self._rest = b"" if self._skipping else rest
        kept = [line for line in lines if len(line) <= self._limit]
        self.overlong += len(lines) - len(kept)
        return tuple(line for line in kept if line.strip())
