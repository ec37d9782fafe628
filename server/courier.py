"""The server's only hands on Flower's Grid: frames out, frames back as they arrive."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
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
    """Sends parcels in waves and yields each reply once, so that memory stays flat in the number of devices.

    Within a wave, replies come in the order of the parcels, whichever device was faster: sums of floats depend on their
    order, and a run shall give the same bytes on every engine.

    Args:
        grid: any of Flower's grids, or the in-process one.
        timeout: seconds to wait for a wave; devices that have not answered by then are reported as errors.
        wave: parcels under way at once (Flower hands replies over in lists, so a wave bounds the memory they take).
        pause: seconds between polls of a grid that had nothing to give.
    """

    def __init__(self, grid: Grid, *, timeout: float, wave: int = 32, pause: float = 0.05) -> None:
        self._grid, self._timeout, self._wave, self._pause = grid, timeout, wave, pause

    def nodes(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def exchange(self, parcels: Iterable[Parcel], group: str) -> Iterator[Reply]:
        """Send parcels, made as their wave goes out, and yield each one's reply."""
        coming = iter(parcels)
        while wave := list(islice(coming, self._wave)):
            yield from self._exchange_wave(wave, group)

    def _exchange_wave(self, parcels: Sequence[Parcel], group: str) -> Iterator[Reply]:
        ids = list(self._grid.push_messages([self._message(parcel, group) for parcel in parcels]))
        waiting = {id_: parcel.node for id_, parcel in zip(ids, parcels, strict=True)}
        early: dict[str, Message] = {}  # answers that wait for an earlier parcel's
        deadline = time.monotonic() + self._timeout
        for id_ in ids:
            while id_ not in early and time.monotonic() < deadline:
                replies = list(self._grid.pull_messages([other for other in waiting if other not in early]))
                for message in replies:
                    # Flower's error replies carry a wrong source node: the message they answer tells who failed.
                    if message.metadata.reply_to_message_id in waiting:
                        early[message.metadata.reply_to_message_id] = message
                if not replies:
                    time.sleep(self._pause)
            node = waiting.pop(id_)
            answer = early.pop(id_, None)
            yield _open(answer, node) if answer else Reply(node=node, error=f"no answer within {self._timeout:g} s")

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
