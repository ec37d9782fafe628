"""OUT/superlink/nodes.json: for each of Flower's nodes, the device that its key was given to.

A SuperLink knows a connection by its key, and so by a node number that stays with the key. The server that keeps the
keys writes down whose each is; the ServerApp holds what a device calls itself against that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedloom.server.disk import write_whole

NODES_FILE = "nodes.json"


def write_nodes(folder: Path, names: Mapping[int, str]) -> None:
    """Replace the list of a SuperLink's folder."""
    table = {str(node): name for node, name in names.items()}
    write_whole(folder / NODES_FILE, json.dumps(table, indent=1, sort_keys=True).encode())


class Enrolled:
    """The list as it stands, read again when it changes. Nobody is on one that is not there or cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NODES_FILE
        self._stamp: tuple[int, int] | None = None
        self._names: dict[int, str] = {}

    def names(self) -> Mapping[int, str]:
        """The device of each node."""
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_mtime_ns)
            if stamp != self._stamp:
                table = json.loads(self._path.read_bytes())
                self._names, self._stamp = {int(node): str(name) for node, name in table.items()}, stamp
        except (OSError, ValueError, AttributeError, RecursionError):
            self._names, self._stamp = {}, None
        return self._names


def check_name(claimed: str, node: int, names: Mapping[int, str] | None) -> None:
    """Raise ValueError unless a node is the device that it says it is; None, where there are no keys, knows no better.

    Whoever holds a key is one device: it can neither pass for another nor be two.
    """
    if names is None:
        return
    owner = names.get(node)
    if owner is None:
        raise ValueError(f"its key was taken back, and it calls itself {claimed!r}")
    if owner != claimed:
        raise ValueError(f"its key was given to {owner!r}, and it calls itself {claimed!r}")
