"""The server's only hands on Flower's Grid: frames out, frames back as they arrive."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

RECORD = "fedloom"  # the one record of every message, with the codec's bytes under this key:
FRAME = "frame"


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """One frame on its way to a node."""

    node: int
    kind: str  # Flower's message type: "train", "evaluate" or "query"
    frame: bytes


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back for a parcel: a frame, or the reason why there is none."""

    node: int
    frame: bytes = b""
    error: str = ""


class Courier:
    """Sends parcels a window at a time and yields each reply once, as it arrives: memory stays flat in their number.

    Args:
        grid: any of Flower's grids, or the in-process one.
        timeout: seconds to wait for an answer; a device that has not answered by then is reported as an error.
        window: parcels under way at once. A grid in this process holds them in memory; a SuperLink keeps them on disk.
        pause: seconds between polls of a grid that had nothing to give.
        batch: parcels handed over, or answers asked for, in one call: Flower holds those of one call in memory.
    """

    def __init__(self, grid: Grid, *, timeout: float, window: int = 32, pause: float = 0.05, batch: int = 8) -> None:
        self._grid, self._timeout, self._window, self._pause, self._batch = grid, timeout, window, pause, batch

    def nodes(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def exchange(self, parcels: Iterable[Parcel], group: str) -> Generator[Reply, None, None]:
        """Send parcels, made as their turn comes, and yield each one's reply in the order of arrival."""
        coming = iter(parcels)
        waiting: dict[str, tuple[int, float]] = {}  # message: its node, and when to give up on it
        while True:
            while len(waiting) < self._window and (some := self._next(coming, len(waiting))):
                ids = self._grid.push_messages([self._message(parcel, group) for parcel in some])
                for id_, parcel in zip(ids, some, strict=True):
                    if id_:
                        waiting[id_] = (parcel.node, time.monotonic() + self._timeout)
                    else:
                        yield Reply(node=parcel.node, error="Flower did not take the message")
            if not waiting:
                return
            found = False
            for reply in self._arrived(waiting):
                found = True
                yield reply
            late = [id_ for id_, (_, until) in waiting.items() if time.monotonic() >= until]
            for id_ in late:
                yield Reply(node=waiting.pop(id_)[0], error=f"no answer within {self._timeout:g} s")
            if not found:
                time.sleep(self._pause)

    def _next(self, coming: Iterator[Parcel], under_way: int) -> list[Parcel]:
        return list(islice(coming, min(self._batch, self._window - under_way)))

    def _arrived(self, waiting: dict[str, tuple[int, float]]) -> Iterator[Reply]:
        """The answers that one poll of the grid finds, taken out of `waiting`."""
        ids = iter(list(waiting))
        while some := list(islice(ids, self._batch)):
            for message in self._grid.pull_messages(some):
                # Flower's error replies carry a wrong source node: the message they answer tells who failed.
                answered = waiting.pop(message.metadata.reply_to_message_id, None)
                if answered is not None:
                    yield _open(message, answered[0])

    def _message(self, parcel: Parcel, group: str) -> Message:
        content = RecordDict({RECORD: ConfigRecord({FRAME: parcel.frame})})
        return Message(content, parcel.node, parcel.kind, group_id=group)


def _open(message: Message, node: int) -> Reply:
    if message.has_error():
        return Reply(node=node, error=f"Flower error {message.error.code}: {message.error.reason}")
    record = message.content.get(RECORD)
    frame = record.get(FRAME) if isinstance(record, ConfigRecord) else None
    if not isinstance(frame, bytes):
        return Reply(node=node, error=f"an answer must carry the record {RECORD!r} with bytes under {FRAME!r}")
    return Reply(node=node, frame=frame)
