"""Who may pass the SuperLink's door, and who did: two files between the door and the server that watches it.

    superlink/door.json    the keys that are let in and those that were revoked; written whole by the server
    superlink/door.jsonl   one JSON object a line, by the door: connected, left, waits, taken over, sent back, refused

Every line has `time` (Unix seconds), `event`, `device` (empty for an unknown key), `address` and `why`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.server.disk import write_whole

GUESTS_FILE = "door.json"
VISITS_FILE = "door.jsonl"
LONGEST_KEY = 2000  # characters of base64; a P-521 public key in PEM has 360
QUIET = 30.0  # seconds in which the same visit is told once
KEPT = 1000  # visits that are remembered for that
LARGEST_FILE = 2**20  # bytes; then the file starts anew


@dataclass(frozen=True, kw_only=True)
class Guests:
    """Keys by the SHA-256 of their PEM bytes (hex), and the largest request in bytes. None lets in any key."""

    limit: int
    known: Mapping[str, str] | None = None
    revoked: Mapping[str, str] = field(default_factory=dict)


def key_digest(pem: bytes) -> str:
    """What a public key goes by here: the SHA-256 of its PEM bytes, as Flower sends them."""
    return hashlib.sha256(pem).hexdigest()


def sent_key(header: bytes) -> bytes:
    """The PEM bytes of a key header; empty where it is none or no base64."""
    try:
        return base64.b64decode(header, validate=True) if len(header) <= LONGEST_KEY else b""
    except ValueError:
        return b""


def write_guests(folder: Path, guests: Guests) -> None:
    body = {"limit": guests.limit, "known": guests.known, "revoked": guests.revoked}
    write_whole(folder / GUESTS_FILE, json.dumps(body, indent=1, sort_keys=True).encode())


class GuestList:
    """door.json as it stands, read again when it changes."""

    def __init__(self, folder: Path, *, every: float = 0.5) -> None:
        """
        Raises:
            OSError, ValueError: when the file is not there or not what `write_guests` wrote.
        """
        self._path, self._every = folder / GUESTS_FILE, every
        self._stamp: tuple[int, int] = (0, 0)
        self._next = 0.0
        self._guests = self._read()

    def __call__(self) -> Guests:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            status = self._path.stat()
            if (status.st_ino, status.st_mtime_ns) != self._stamp:
                self._guests = self._read()
        return self._guests

    def _read(self) -> Guests:
        status = self._path.stat()
        try:
            table = json.loads(self._path.read_bytes())
            guests = Guests(limit=table["limit"], known=table["known"], revoked=table["revoked"])
        except (ValueError, LookupError, TypeError, RecursionError):
            guests = Guests(limit=-1)
        lists = (guests.revoked, {} if guests.known is None else guests.known)
        good = all(isinstance(each, dict) and all(isinstance(name, str) for name in each.values()) for each in lists)
        if not good or type(guests.limit) is not int or guests.limit < 0:
            raise ValueError(f"{self._path} must be what the server wrote for the door")
        self._stamp = (status.st_ino, status.st_mtime_ns)
        return guests


class VisitLog:
    """Appends visits; the same one again within half a minute is left out, so that nobody can fill the disk."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / VISITS_FILE
        self._told: OrderedDict[tuple[str, ...], float] = OrderedDict()

    def __call__(self, event: str, *, device: str = "", address: str = "", why: str = "", alike: str = "") -> None:
        """`alike`: what `why` is about, where it holds numbers that differ each time."""
        now, visit = time.monotonic(), (event, device, address, alike or why)
        if event in ("refused", "waits", "sent back") and now - self._told.get(visit, -QUIET) < QUIET:
            return
        self._told[visit] = now
        self._told.move_to_end(visit)
        while len(self._told) > KEPT:
            self._told.popitem(last=False)
        line = json.dumps({"time": time.time(), "event": event, "device": device, "address": address, "why": why})
        if self._path.exists() and self._path.stat().st_size > LARGEST_FILE:
            os.replace(self._path, self._path.with_suffix(".jsonl.old"))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def digests(keys: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Names by digest of (name, PEM bytes)."""
    return {key_digest(pem): name for name, pem in keys}
