"""Messages between an agent and the process that holds its model: a small JSON object, and a frame behind it or none.

Both ends belong to one program and trust each other; nothing but frames crosses from the network, unread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any


class Pipe:
    """One end; several threads may send, one receives."""

    def __init__(self, handle: int) -> None:
        """`handle` is a connected socket's file descriptor, which this end then owns."""
        self._connection: Any = Connection(handle)
        self._sending = Lock()

    def send(self, message: Mapping[str, Any], frame: bytes = b"") -> None:
        """Send a message.

        Raises:
            OSError: when the other end is gone.
        """
        head = json.dumps({**message, "frame": bool(frame)}).encode()
        with self._sending:
            self._connection.send_bytes(head)
            if frame:
                self._connection.send_bytes(frame)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """The next message and its frame.

        Raises:
            EOFError, OSError: when the other end is gone.
        """
        message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        frame: bytes = self._connection.recv_bytes() if message.pop("frame") else b""
        return message, frame

    def close(self) -> None:
        self._connection.close()
