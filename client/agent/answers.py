"""The last answers on disk, by the digest of the task frame they answer.

A task that comes again, because the server or the link broke down before the answer arrived, is answered with the same
bytes and no work. A file is a line of JSON and the frame behind it; it is written whole or not at all, and one that
does not hold what its line says is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedloom.client.tensorfile import write_whole

KEPT: Final = 4


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A frame to send, and what the outbox says about it."""

    frame: bytes
    about: Mapping[str, Any] = field(default_factory=dict)


class Answers:
    """The answers of one device."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @staticmethod
    def digest(frame: bytes, identity: str) -> str:
        """The name of the answer to a task frame. `identity` stands for all else that the answer depends on."""
        return hashlib.blake2b(frame, digest_size=16, key=identity.encode()[:64]).hexdigest()

    def get(self, digest: str) -> Answer | None:
        """The answer of that name, or None where there is none, or a damaged one."""
        try:
            head, _, frame = (self._folder / digest).read_bytes().partition(b"\n")
            noted = json.loads(head)
            if noted["blake2b"] != _hash(frame):
                return None
            return Answer(frame=frame, about=dict(noted["about"]))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def put(self, digest: str, answer: Answer) -> None:
        """Keep an answer, and let the oldest go.

        Raises:
            OSError: where the disk fails.
        """
        head = json.dumps({"blake2b": _hash(answer.frame), "about": dict(answer.about)}).encode()
        write_whole(self._folder / digest, head + b"\n" + answer.frame)
        kept = sorted(self._folder.glob("[0-9a-f]*"), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[:-KEPT]:
            old.unlink(missing_ok=True)


def _hash(frame: bytes) -> str:
    return hashlib.blake2b(frame, digest_size=16).hexdigest()
