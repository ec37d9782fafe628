"""Frames in chunks: cut on one side of the agent's socket, put together again on the other."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Final

from fedloom.protocols import agent_pb2 as pb
from fedloom.protocols.framing import MAGIC

CHUNK: Final = 2**20  # bytes
_SMALLEST: Final = 2**12  # bytes a chunk must have on average, so that a frame does not come byte by byte


def cut(frame: bytes) -> Iterator[pb.Chunk]:
    """A frame as chunks of at most CHUNK bytes, the first of which says how long the frame is."""
    view = memoryview(frame)
    for start in range(0, max(len(frame), 1), CHUNK):
        total = len(frame) if start == 0 else 0
        yield pb.Chunk(data=bytes(view[start : start + CHUNK]), total=total)


def gather(chunks: Iterable[pb.Chunk], *, limit: int) -> bytes:
    """The frame that chunks make up. What is too long, or no frame at all, is refused at its first chunk.

    Raises:
        ValueError: for a frame longer than `limit` bytes, chunks that do not add up to it, or too many of them.
    """
    buffer, total = io.BytesIO(), 0
    for count, chunk in enumerate(chunks, start=1):
        if count == 1:
            total = chunk.total
            if total > limit:
                raise ValueError(f"a frame must be <= {limit} bytes, got one of {total}")
            if chunk.data[: len(MAGIC)] != MAGIC:
                raise ValueError(f"a frame must begin with {MAGIC!r}, got {chunk.data[: len(MAGIC)]!r}")
        if len(chunk.data) > CHUNK or buffer.tell() + len(chunk.data) > total:
            raise ValueError(f"chunks must be <= {CHUNK} bytes and add up to the {total} announced, got more")
        if count > total // _SMALLEST + 16:
            raise ValueError(f"a frame of {total} bytes must come in fewer than {count} chunks")
        buffer.write(chunk.data)
    if buffer.tell() != total or not total:
        raise ValueError(f"chunks must add up to the {total} bytes announced, got {buffer.tell()}")
    return buffer.getvalue()
