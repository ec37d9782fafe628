"""Frames: as they come, and as a stranger makes them who knows the format and gets every checksum right.

An accepted frame must stand for a message that goes out again and comes back equal; a fp32 one as the same bytes.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final

import corpus
import numpy as np
from generation import MESSAGES, WIRES
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from mutation import havoc, mutate_record, parsed
from targets import MIB, Broken, Havoc, Target, same

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols.bitpack import index_bits, packed_bytes
from fedloom.protocols.codec import decode, decode_answer, encode
from fedloom.protocols.framing import checksum, pack
from fedloom.protocols.messages import Hello, Refusal, Task, Update
from fedloom.protocols.quantize import stored_bytes

LIMIT: Final = 1 << 20
RECORDS: Final[dict[type[Any], Any]] = {Task: pb.Task, Update: pb.Update, Hello: pb.Hello, Refusal: pb.Refusal}
KINDS: Final = list(RECORDS)  # a frame's kind is its message's place here, from 1
_WIRES: Final = {pb.DTYPE_FP32: "fp32", pb.DTYPE_FP16: "fp16", pb.DTYPE_BF16: "bf16", pb.DTYPE_INT8: "int8"}
_HEADER: Final = 16
# Two payloads of 2^20 coefficients each, at some 100 bytes, and what a second decoding of them adds.
_MEMORY: Final = 280 * MIB
_SECONDS: Final = 6.0


def check_frame(frame: bytes, expect: type[Any]) -> None:
    """Decode, and where that succeeds encode and decode again."""
    returns(decode(frame, expect, limit=LIMIT), frame)


def returns(message: Any, frame: bytes) -> None:
    """Raise Broken unless a message that was in `frame` goes out and comes back equal."""
    again = encode(message)
    second = decode(again, type(message), limit=1 << 26)
    difference(type(message).__name__.lower(), second, message)
    if frame != again and encode(second) != again:
        raise Broken("the same message must be the same bytes")
    wire = _only_way(message, frame)
    if wire and encode(message, wire=wire) != frame:
        raise Broken(f"a message must be the only one of its bytes, got another {wire} frame than {frame.hex()}")


def _only_way(message: Any, frame: bytes) -> str:
    """The one dtype of a frame, if nothing in it may be written in two ways; else nothing.

    int8 rounds by chance, and scalars that are equal may be sent one by one.
    """
    if isinstance(message, Hello | Refusal):
        return "fp32"
    record = parsed(RECORDS[type(message)], split(frame)[0])
    dtypes = set()
    for payload in _payloads(record):
        tensors = [t for factor in payload.factors for t in (factor.b, factor.a)] + [d.tensor for d in payload.dense]
        dtypes |= {tensor.dtype for tensor in tensors}
        dtypes |= {payload.scalars.dtype, pb.DTYPE_INT8} if payload.HasField("scalars") else set()
    wires = {_WIRES[dtype] for dtype in dtypes} or {"fp32"}
    return wires.pop() if len(wires) == 1 and "int8" not in wires else ""


def difference(where: str, one: Any, two: Any) -> None:
    """Raise Broken at the first place where two messages differ, the order of mappings included."""
    if isinstance(one, np.ndarray):
        equal = isinstance(two, np.ndarray) and one.dtype == two.dtype and one.shape == two.shape
        if not (equal and one.tobytes() == two.tobytes()):
            raise Broken(f"{where} must come back as it went, got {one!r:.200} for {two!r:.200}")
    elif is_dataclass(one) and not isinstance(one, type):
        same(f"type of {where}", type(one), type(two))
        for field in fields(one):
            difference(f"{where}.{field.name}", getattr(one, field.name), getattr(two, field.name))
    elif isinstance(one, Mapping):
        same(f"names of {where}", list(one), list(two))
        for name in one:
            difference(f"{where}[{name!r}]", one[name], two[name])
    else:
        same(where, (type(one), repr(one)), (type(two), repr(two)))  # repr: -0.0 is not 0.0


def _payloads(record: Any) -> list[Any]:
    """The payloads of a record, in the order of their data."""
    if isinstance(record, pb.Task):
        return [record.start, record.patch.payload] if record.HasField("patch") else [record.start]
    return [record.payload] if isinstance(record, pb.Update) else []


def _needed(payload: Any) -> int:
    """How many bytes a payload's shapes announce: this file's own count, beside the decoder's."""
    total = 0
    tensors: list[tuple[Any, int | None]] = [
        (t, axis) for factor in payload.factors for t, axis in ((factor.b, 1), (factor.a, 0))
    ]
    tensors += [(entry.tensor, None if len(entry.tensor.shape) == 1 else 0) for entry in payload.dense]
    for tensor, axis in tensors:
        shape = tuple(tensor.shape)
        if tensor.dtype in _WIRES and (axis is None or axis < len(shape)):
            size = stored_bytes(_WIRES[tensor.dtype], shape, axis)
            total += size + -size % 16
    if payload.HasField("scalars") and payload.scalars.dtype in _WIRES:
        scalars = payload.scalars
        total += stored_bytes(_WIRES[scalars.dtype], (1 if scalars.equal else scalars.count,), None)
        total += packed_bytes(scalars.count, index_bits(scalars.k)) if scalars.over == pb.OVER_POOL else 0
    return total + int(payload.coefficients.data_bytes)


def repair(record: Any, data: bytes, rng: random.Random, *, resize: bool) -> bytes:
    """The frame of a record with right checksums; with `resize` every payload gets as much data as it announces."""
    pieces, left = [], data
    holders = _payloads(record)
    for place, payload in enumerate(holders):
        size = len(left) if place == len(holders) - 1 else min(payload.data_bytes, len(left))
        if resize and (wanted := _needed(payload)) <= 1 << 16:
            size = wanted
        piece, left = left[:size], left[size:]
        piece += rng.randbytes(size - len(piece))
        payload.data_bytes, payload.data_crc32 = len(piece), checksum([piece])
        pieces.append(piece)
    kind = KINDS.index(next(known for known, own in RECORDS.items() if isinstance(record, own))) + 1
    return pack(kind, record.SerializeToString(deterministic=True), [*pieces, left if not resize else b""])


def split(frame: bytes) -> tuple[bytes, bytes]:
    """The body and the tensor data of a frame, as far as it has them."""
    start = max(len(frame) - int.from_bytes(frame[8:12], "little"), _HEADER)
    return frame[start:], frame[_HEADER:start]


def mutate_frame(frame: bytes, rng: random.Random, change: Havoc, kind: type[Any]) -> bytes:
    """Another frame: fields or data changed, and nearly always repaired."""
    body, data = split(frame)
    if rng.random() < 0.15:
        body = change(body)
    record = parsed(RECORDS[kind], body)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        mutate_record(record, rng)
    if rng.random() < 0.3:
        data = change(data)
    if rng.random() < 0.03:  # as the fields say, right or wrong
        return pack(KINDS.index(kind) + 1, record.SerializeToString(deterministic=True), [data])
    return repair(record, data, rng, resize=rng.random() < 0.7)


def built(kind: type[Any]) -> SearchStrategy[bytes]:
    """Frames of good messages that hypothesis builds field by field; one of three is then changed in its structure."""

    def frame(message: Any, wire: str, seed: int) -> bytes:
        made = encode(message, wire=wire, seed=seed)
        rng = random.Random(seed)
        return made if seed % 3 else mutate_frame(made, rng, functools.partial(havoc, rng=rng), kind)

    return st.builds(frame, MESSAGES[kind](), WIRES, st.integers(0, 2**32 - 1))


def _structured(kind: type[Any], seeds: Callable[[], Sequence[Any]]) -> Target:
    return Target(
        name=kind.__name__.lower(),
        check=functools.partial(check_frame, expect=kind),
        seeds=lambda: corpus.frames(seeds()),
        mutate=functools.partial(mutate_frame, kind=kind),
        inputs=lambda: built(kind),
        seconds=_SECONDS if kind in (Task, Update) else 1.0,
        memory=_MEMORY if kind in (Task, Update) else 16 * MIB,
    )


def _check_any(frame: bytes) -> None:
    """A frame of any kind, as whoever reads its kind first would."""
    kind = KINDS[(frame[6] if len(frame) > 6 else 0) % 4 - 1]
    check_frame(frame, kind)


def _every_frame() -> list[bytes]:
    return corpus.frames([*corpus.updates(), *corpus.tasks(), *corpus.hellos(), *corpus.refusals()])


def _answers() -> list[bytes]:
    updates = [b"\0" + frame for frame in corpus.frames([*corpus.updates(), *corpus.refusals()])]
    return updates + [b"\xff" + frame for frame in corpus.frames([*corpus.hellos(), *corpus.refusals()])]


def _check_answer(data: bytes) -> None:
    """What a server does with an answer: it may be one of two kinds."""
    expect: tuple[Any, Any] = (Update, Refusal) if data[:1] < b"\x80" else (Hello, Refusal)
    answer = decode_answer(data[1:], expect, limit=LIMIT)
    if not isinstance(answer, expect):
        raise Broken(f"an answer must be one of {expect}, got {type(answer)}")
    returns(answer, data[1:])


def _mutate_answer(data: bytes, rng: random.Random, change: Havoc) -> bytes:
    kind = KINDS[(data[7] if len(data) > 7 else 1) % 4 - 1]
    flag = data[:1] or b"\0" if rng.random() < 0.9 else bytes([rng.randrange(256)])
    return flag + mutate_frame(data[1:], rng, change, kind)


def targets(folder: Path) -> dict[str, Target]:
    """Nothing here touches files."""
    made = [
        Target(name="frame", check=_check_any, seeds=_every_frame, seconds=_SECONDS, memory=_MEMORY),
        _structured(Task, corpus.tasks),
        _structured(Update, corpus.updates),
        _structured(Hello, corpus.hellos),
        _structured(Refusal, corpus.refusals),
        Target(
            name="answer",
            check=_check_answer,
            seeds=_answers,
            mutate=_mutate_answer,
            seconds=_SECONDS,
            memory=_MEMORY,
        ),
    ]
    return {target.name: target for target in made}
