"""The server's only hands on Flower's Grid: frames out, frames back as they arrive."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedloom.protocols.validate import one_line

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
        mail = self.mail(group, window=self._window)
        while True:
            yield from mail.send(coming)
            if mail.empty:
                return
            yield from mail.poll()

    def mail(self, group: str, *, window: int = sys.maxsize) -> Mail:
        """An exchange to which parcels may be added while others are under way."""
        return Mail(self._grid, group, timeout=self._timeout, window=window, pause=self._pause, batch=self._batch)


class Mail:
    """Parcels under way, and their replies as they come; arguments as the Courier's."""

    def __init__(self, grid: Grid, group: str, *, timeout: float, window: int, pause: float, batch: int) -> None:
        self._grid, self._group = grid, group
        self._timeout, self._window, self._pause, self._batch = timeout, window, pause, batch
        self._waiting: dict[str, tuple[int, float]] = {}  # message: its node, and when to give up on it

    @property
    def empty(self) -> bool:
        return not self._waiting

    def send(self, coming: Iterator[Parcel]) -> Iterator[Reply]:
        """Hand parcels over, made as their turn comes, while there is room; yields an error for each that is lost."""
        while some := list(islice(coming, min(self._batch, self._window - len(self._waiting)))):
            ids = self._grid.push_messages([to_message(parcel, self._group) for parcel in some])
            for id_, parcel in zip(ids, some, strict=True):
                if id_:
                    self._waiting[id_] = (parcel.node, time.monotonic() + self._timeout)
                else:
                    yield Reply(node=parcel.node, error="Flower did not take the message")

    def poll(self) -> Iterator[Reply]:
        """What has come since, and errors for what is overdue; pauses when there was nothing."""
        found = False
        ids = iter(list(self._waiting))
        while some := list(islice(ids, self._batch)):
            for message in self._grid.pull_messages(some):
                # Flower's error replies carry a wrong source node: the message they answer tells who failed.
                answered = self._waiting.pop(message.metadata.reply_to_message_id, None)
                if answered is not None:
                    found = True
                    yield to_reply(message, answered[0])
        for id_ in [id_ for id_, (_, until) in self._waiting.items() if time.monotonic() >= until]:
            found = True
            yield Reply(node=self._waiting.pop(id_)[0], error=f"no answer within {self._timeout:g} s")
        if not found:
            time.sleep(self._pause)


def to_message(parcel: Parcel, group: str) -> Message:
    """Flower's message for a parcel."""
    content = RecordDict({RECORD: ConfigRecord({FRAME: parcel.frame})})
    return Message(content, parcel.node, parcel.kind, group_id=group)


def to_reply(message: Message, node: int) -> Reply:
    """The frame in an answer, or the reason why there is none; Flower's may be a traceback, and becomes one line."""
    if message.has_error():
        return Reply(node=node, error=one_line(f"Flower error {message.error.code}: {message.error.reason}"))
    record = message.content.get(RECORD)
    frame = record.get(FRAME) if isinstance(record, ConfigRecord) else None
    if not isinstance(frame, bytes):
        return Reply(node=node, error=f"an answer must carry the record {RECORD!r} with bytes under {FRAME!r}")
    return Reply(node=node, frame=frame)
