"""The frame around every message, and the checks that come before anything in it is believed.

    offset  bytes  what
    0       4      magic, "FDLM"
    4       2      protocol version
    6       1      message kind
    7       1      zero
    8       4      bytes of the body (the protobuf message)
    12      4      CRC-32 of the 12 bytes before it and the body
    16      ...    tensor data; the body holds its size and CRC-32, one for each payload
    the end n      the body

Tensor data stays outside the protobuf message so that it is copied once on the way out and not at all on the way in,
and so that what a parser has to allocate for is bounded by BODY_LIMIT, whatever the size of a frame. It begins at a
multiple of 16 bytes, and the body behind it needs no padding. All integers are little-endian. The checksums catch
accidents; authenticity is TLS's.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Final

from fedloom.protocols.messages import PROTOCOL_VERSION

Buffer = bytes | memoryview

MAGIC: Final = b"FDLM"
ALIGN: Final = 16
BODY_LIMIT: Final = 8 << 20  # a hostile body of empty messages costs a parser some 40 bytes a byte

_HEADER: Final = struct.Struct("<4sHBBII")
_CHECKED: Final = 12  # bytes of the header that its checksum covers


def padding(length: int) -> bytes:
    """Zeros that bring `length` up to a multiple of ALIGN."""
    return bytes(-length % ALIGN)


def checksum(chunks: Iterable[Buffer]) -> int:
    """CRC-32 of the chunks, one after another."""
    value = 0
    for chunk in chunks:
        value = zlib.crc32(chunk, value)
    return value


def pack(kind: int, body: bytes, data: Sequence[Buffer]) -> bytes:
    """One frame. Its size depends on no measured number and no library's version, so that byte counts repeat.

    Raises:
        ValueError: for a body larger than BODY_LIMIT.
    """
    if len(body) > BODY_LIMIT:
        raise ValueError(f"a message without its tensor data must be <= {BODY_LIMIT} bytes, got {len(body)}")
    header = _HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, 0, len(body), 0)[:_CHECKED]
    return b"".join([header, struct.pack("<I", checksum([header, body])), *data, body])


def kind_of(frame: bytes) -> int:
    """The message kind that a frame claims, unchecked; 0 for what is too short to have one."""
    return int(_HEADER.unpack_from(frame)[2]) if len(frame) >= _HEADER.size else 0


def unpack(frame: bytes, kind: int, kind_names: Sequence[str], *, limit: int) -> tuple[bytes, memoryview]:
    """The body and a read-only view of the tensor data of a frame of message `kind`.

    Raises:
        ValueError: for a frame that is not one, speaks another version, holds another message, is larger than `limit`
            bytes, truncated, too long or damaged.
    """
    if len(frame) < _HEADER.size:
        raise ValueError(f"a frame must have at least {_HEADER.size} bytes, got {len(frame)}")
    magic, version, got_kind, zero, body_bytes, crc = _HEADER.unpack_from(frame)
    if magic != MAGIC:
        raise ValueError(f"a frame must begin with {MAGIC!r}, got {magic!r}")
    if version != PROTOCOL_VERSION:
        raise ValueError(f"this side speaks protocol version {PROTOCOL_VERSION}, the frame is of version {version}")
    if got_kind != kind:
        got = kind_names[got_kind] if got_kind < len(kind_names) else f"kind {got_kind}"
        raise ValueError(f"frame must hold {kind_names[kind]}, got {got}")
    if len(frame) > limit:
        raise ValueError(f"a frame must be <= {limit} bytes, got {len(frame)}")
    if body_bytes > BODY_LIMIT:
        raise ValueError(f"a message without its tensor data must be <= {BODY_LIMIT} bytes, got {body_bytes}")
    start = len(frame) - body_bytes
    if start < _HEADER.size:
        raise ValueError(f"frame must have the {_HEADER.size + body_bytes} bytes it announces, got {len(frame)}")
    view = memoryview(frame)
    if (got_crc := checksum([view[:_CHECKED], view[start:]])) != crc:
        raise ValueError(f"frame is damaged or cut: checksum of its body must be {crc:#010x}, got {got_crc:#010x}")
    if zero:
        raise ValueError(f"byte 7 of a frame must be zero, got {zero}")
    return bytes(view[start:]), view[_HEADER.size : start]
