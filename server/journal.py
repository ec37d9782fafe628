"""The journal of the running round: what was asked, and every good answer, on disk before it is merged.

    journal/round-000007-train/plan.json     the reports that the round was planned from
    journal/round-000007-train/HASH.frame    one accepted answer: the task's size (8 bytes, little-endian), the CRC-32
                                             of these 8 bytes, and the frame, which has checksums of its own

A server that is killed in a round plans the same tasks again from the same reports, takes the answers that it had
accepted from here, and asks only the devices that are missing. Each file is whole or not there at all.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedloom.protocols.messages import DeviceReport
from fedloom.server.disk import sealed, unsealed, write_whole

PLAN_FILE = "plan.json"
_HEAD = struct.Struct("<QI")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One accepted answer."""

    down: int  # bytes of the task that was answered
    frame: bytes


class Journal:
    """The files of one phase of one round."""

    def __init__(self, folder: Path, *, round: int, kind: str) -> None:
        self._root = folder
        self._folder = folder / f"round-{round:06d}-{kind}"

    def planned(self) -> list[DeviceReport] | None:
        """The reports that this phase was planned from before the server was cut; None for a phase that is new.

        Raises:
            ValueError: for a file that is not what `plan` wrote.
        """
        path = self._folder / PLAN_FILE
        try:
            noted = unsealed(path.read_bytes())
            return [_report(entry) for entry in noted["devices"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"journal {path} cannot be read: {error}; delete the folder to ask its devices again"
            ) from None

    def plan(self, reports: Sequence[DeviceReport]) -> None:
        """Note what a phase is planned from, and drop what is left of earlier ones."""
        for old in self._root.glob("round-*"):
            if old.name[:12] != self._folder.name[:12]:
                shutil.rmtree(old)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._folder / PLAN_FILE, sealed({"devices": [asdict(report) for report in reports]}))

    def put(self, device: str, entry: Entry) -> None:
        write_whole(self._path(device), _head(entry.down) + entry.frame)

    def get(self, device: str) -> Entry | None:
        """The accepted answer of a device; None where there is none, or a damaged one."""
        try:
            data = self._path(device).read_bytes()
        except FileNotFoundError:
            return None
        if len(data) < _HEAD.size:
            return None
        down, _ = _HEAD.unpack_from(data)
        return Entry(down=down, frame=data[_HEAD.size :]) if data.startswith(_head(down)) else None

    def _path(self, device: str) -> Path:
        """A device's file: names come from the network, so only their hash becomes part of a path."""
        return self._folder / f"{hashlib.sha256(device.encode()).hexdigest()[:32]}.frame"


def _head(down: int) -> bytes:
    return _HEAD.pack(down, zlib.crc32(down.to_bytes(8, "little")))


def close_journal(folder: Path) -> None:
    """Drop everything: the round's checkpoint is written."""
    shutil.rmtree(folder, ignore_errors=True)


def _report(entry: Mapping[str, object]) -> DeviceReport:
    table = dict(entry)
    table["capabilities"] = tuple(table["capabilities"])  # type: ignore[arg-type]
    return DeviceReport(**table)  # type: ignore[arg-type]
