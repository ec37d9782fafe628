"""Whatever a stranger sends is refused with one line, before it costs anything."""

from __future__ import annotations

import re
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import framing
from fedloom.protocols.codec import TaskEncoder, decode, encode
from fedloom.protocols.messages import (
    Cost,
    DeviceReport,
    Hello,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Patch,
    Payload,
    Refusal,
    Start,
    Task,
    Update,
)

LIMIT = 1 << 20
TASK, UPDATE = 1, 2


def payload() -> Payload:
    ones = np.ones((2, 1), np.float32)
    return Payload(factors={"q": LowRank(b=ones, a=ones.T, alpha=1.0)}, dense={"n": np.float32([1, 2, 3])})


def update(**changes: Any) -> Update:
    return Update(**({"device": "d", "round": 1, "examples": 1, "payload": payload()} | changes))


def task(**changes: Any) -> Task:
    base: dict[str, Any] = {"device": "d", "round": 1, "rank": 1, "alpha": 1.0, "start_from": Start.FRESH}
    return Task(**(base | changes))


def hello(report: dict[str, Any] | None = None, spec: dict[str, Any] | None = None) -> Hello:
    return Hello(
        report=DeviceReport(**({"device": "d", "examples": 1, "rank": 2} | (report or {}))),
        spec=ModelSpec(**({"base_hash": "h", "matrices": {}} | (spec or {}))),
    )


def forged(kind: int, change: Callable[[Any], Any], message: Any = None, data: bytes | None = None) -> bytes:
    """A frame with right checksums around a record that `change` has altered."""
    message = message or (task(start=payload()) if kind == TASK else update())
    body, sent = framing.unpack(encode(message), kind, ["", "Task", "Update"], limit=LIMIT)
    record = (pb.Task if kind == TASK else pb.Update).FromString(body)
    change(record)
    return framing.pack(kind, record.SerializeToString(deterministic=True), [sent if data is None else data])


def recounted(record: Any, data: bytes) -> None:
    record.payload.data_bytes, record.payload.data_crc32 = len(data), framing.checksum([data])


def patched(frame: bytes, offset: int, layout: str, value: Any) -> bytes:
    size = struct.calcsize(layout)
    return frame[:offset] + struct.pack(layout, value) + frame[offset + size :]


def checked(frame: bytes) -> bytes:
    """A frame with the checksum that its header and body should have."""
    start = len(frame) - int.from_bytes(frame[8:12], "little")
    return patched(frame, 12, "<I", framing.checksum([frame[:12], frame[start:]]))


def test_frames_are_refused_in_order() -> None:
    frame = encode(update())
    cases = [
        (b"", "a frame must have at least 16 bytes, got 0"),
        (patched(frame, 0, "4s", b"PK\3\4"), "a frame must begin with b'FDLM', got b'PK"),
        (patched(frame, 4, "<H", 9), "this side speaks protocol version 3, the frame is of version 9"),
        (patched(frame, 6, "B", 1), "frame must hold Update, got Task"),
        (patched(frame, 6, "B", 77), "frame must hold Update, got kind 77"),
        (
            patched(frame, 8, "<I", 2**32 - 1),
            "a message without its tensor data must be <= 8388608 bytes, got 4294967295",
        ),
        (patched(frame, 8, "<I", len(frame) - 15), f"the {len(frame) + 1} bytes it announces, got {len(frame)}"),
        (patched(frame, 7, "B", 1), "frame is damaged or cut: checksum of its body must be 0x"),
        (frame[:-1], "frame is damaged or cut: checksum of its body must be 0x"),
        (frame + b"\0", "frame is damaged or cut: checksum of its body must be 0x"),
        (patched(frame, len(frame) - 9, "B", frame[-9] ^ 1), "frame is damaged or cut: checksum of its body must be"),
        (patched(frame, 30, "B", frame[30] ^ 1), "update.payload is damaged: checksum must be 0x"),
        (frame[:16] + frame[32:], "tensor data of update.payload must have 48 bytes, 32 are left"),
        (checked(patched(frame, 7, "B", 2)), "byte 7 of a frame must be zero, got 2"),
        (framing.pack(UPDATE, b"\xff\xff", []), "body of Update must be its protobuf record"),
        (framing.pack(UPDATE, b"", []), "update must carry its cost"),
    ]
    for bad, match in cases:
        with pytest.raises(ValueError, match=match):
            decode(bad, Update, limit=LIMIT)


def test_a_frame_over_the_limit_is_refused() -> None:
    frame = encode(update())
    assert decode(frame, Update, limit=len(frame)).examples == 1
    with pytest.raises(ValueError, match=f"a frame must be <= {len(frame) - 1} bytes, got {len(frame)}"):
        decode(frame, Update, limit=len(frame) - 1)


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(b"\xfa\x07\x01x", id="unknown field"),
        pytest.param(b"\x18\x01", id="field twice"),
        pytest.param(b"\x08\x00", id="field out of order"),
    ],
)
def test_a_body_must_be_canonical(tail: bytes) -> None:
    body, data = framing.unpack(encode(update(examples=5)), UPDATE, ["", "", "Update"], limit=LIMIT)
    with pytest.raises(ValueError, match="known fields only, each once and in order"):
        decode(framing.pack(UPDATE, body + tail, [data]), Update, limit=LIMIT)


def set_shape(tensor: Any, *shape: int) -> None:
    tensor.shape[:] = shape


FORGERIES: list[tuple[int, Callable[[Any], Any], str]] = [
    (
        UPDATE,
        lambda r: set_shape(r.payload.dense[0].tensor, 2**40, 2**40),
        "shapes of update.payload need [0-9]+ bytes",
    ),
    (UPDATE, lambda r: set_shape(r.payload.dense[0].tensor, 7), "shapes of update.payload need 64 bytes, .* has 48"),
    (
        UPDATE,
        lambda r: set_shape(r.payload.dense[0].tensor),
        r"dense 'n' must have 1..4 dimensions, each >= 1, got \[\]",
    ),
    (UPDATE, lambda r: set_shape(r.payload.dense[0].tensor, 0), r"dense 'n' must have 1..4 .* got \[0\]"),
    (
        UPDATE,
        lambda r: set_shape(r.payload.dense[0].tensor, *[1] * 9),
        r"must have 1..4 dimensions.* \[1, 1, 1, 1, 1\]",
    ),
    (UPDATE, lambda r: set_shape(r.payload.factors[0].b, 2), r"b of 'q' must have 2 dimensions, got \[2\]"),
    (UPDATE, lambda r: set_shape(r.payload.factors[0].b, 2, 0), r"b of 'q' must have 1..4 dimensions"),
    (
        UPDATE,
        lambda r: set_shape(r.payload.factors[0].b, 1, 2),
        r"factors of 'q' must have rank 1, got \[1, 2\], \[1, 2\]",
    ),
    (UPDATE, lambda r: setattr(r.payload.factors[0], "rank", 4), "factors of 'q' must have rank 4"),
    (UPDATE, lambda r: setattr(r.payload.factors[0], "alpha", 0.0), "alpha of 'q' must be > 0, got 0.0"),
    (UPDATE, lambda r: setattr(r.payload.factors[0], "alpha", float("inf")), "alpha of 'q' must be a finite number"),
    (
        UPDATE,
        lambda r: setattr(r.payload.factors[0].b, "dtype", 9),
        "dtype of b of 'q' must be one of fp32, .* number 9",
    ),
    (UPDATE, lambda r: r.payload.factors[0].ClearField("a"), "dtype of a of 'q' must be one of .* number 0"),
    (
        UPDATE,
        lambda r: r.payload.factors.add().CopyFrom(r.payload.factors[0]),
        "update.payload.factors must differ, got 'q'",
    ),
    (UPDATE, lambda r: r.payload.dense.add().CopyFrom(r.payload.dense[0]), "update.payload.dense must differ, got 'n'"),
    (
        UPDATE,
        lambda r: setattr(r.payload, "data_bytes", 2**60),
        "update.payload must have 1152921504606846976 bytes, 48",
    ),
    (UPDATE, lambda r: setattr(r.payload, "data_crc32", 1), "update.payload is damaged: checksum must be 0x00000001"),
    (UPDATE, lambda r: r.ClearField("payload"), "update must carry its payload"),
    (UPDATE, lambda r: setattr(r, "kind", 9), "update.kind must be one of train, evaluate, got number 9"),
    (UPDATE, lambda r: setattr(r, "round", 2**63), "update.round must be an integer in 0"),
    (UPDATE, lambda r: setattr(r, "device", "x" * 1025), "update.device must be <= 1024 characters, got 1025"),
    (UPDATE, lambda r: setattr(r.cost, "seconds", -1.0), "update.cost.seconds must be >= 0, got -1.0"),
    (
        UPDATE,
        lambda r: r.metrics.add(name="loss", value=float("nan")),
        r"metrics\['loss'\] must be a finite number, got nan",
    ),
    (
        UPDATE,
        lambda r: [r.metrics.add(name="x") for _ in range(2)],
        "names in update.metrics must differ, got 'x' twice",
    ),
    (
        UPDATE,
        lambda r: [r.metrics.add() for _ in range(100_001)],
        "update.metrics must have <= 100000 entries, got 100001",
    ),
    (UPDATE, lambda r: [r.payload.dense.add() for _ in range(100_001)], "update.payload must have <= 100000 tensors"),
    (TASK, lambda r: setattr(r, "start_from", 0), "task.start_from must be one of fresh, .* got number 0"),
    (TASK, lambda r: setattr(r, "wire", 0), "dtype of task.wire must be one of fp32, fp16, bf16, int8, got number 0"),
    (TASK, lambda r: r.knobs.add(name="k"), "knob 'k' must have a value"),
    (TASK, lambda r: r.knobs.add(name="k", real=float("nan")), r"task.knobs\['k'\] must be a finite number, got nan"),
    (TASK, lambda r: setattr(r.patch, "base_hash", "h"), "task.patch must carry its payload"),
    (TASK, lambda r: setattr(r, "alpha", -1.0), "task.alpha must be > 0, got -1.0"),
]


@pytest.mark.parametrize(("kind", "change", "match"), FORGERIES, ids=[match[:50] for _, _, match in FORGERIES])
def test_forged_records_are_refused(kind: int, change: Callable[[Any], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decode(forged(kind, change), Task if kind == TASK else Update, limit=64 << 20)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensors_that_are_not_finite_are_refused_by_name(value: float) -> None:
    _, sent = framing.unpack(encode(update()), UPDATE, ["", "", "Update"], limit=LIMIT)
    data = bytes(sent[:36]) + struct.pack("<f", value) + bytes(sent[40:])
    frame = forged(UPDATE, lambda record: recounted(record, data), data=data)
    with pytest.raises(ValueError, match=r"dense 'n' must be finite, got (nan|inf|-inf) at \[1\]"):
        decode(frame, Update, limit=LIMIT)


def test_tensor_data_that_nothing_accounts_for_is_refused() -> None:
    body, sent = framing.unpack(encode(update()), UPDATE, ["", "", "Update"], limit=LIMIT)
    with pytest.raises(ValueError, match="Update must account for all of its tensor data, 16 bytes are left"):
        decode(framing.pack(UPDATE, body, [sent, bytes(16)]), Update, limit=LIMIT)


BAD_MESSAGES: list[tuple[Any, str]] = [
    (update(examples=-1), "update.examples must be an integer in 0..9223372036854775807, got -1"),
    (update(round=1.0), "update.round must be an integer in 0..9223372036854775807, got 1.0"),
    (update(nonce=2**64), "update.nonce must be an integer in 0..18446744073709551615"),
    (update(kind="sleep"), "update.kind must be one of train, evaluate, got 'sleep'"),
    (update(device="\ud800"), "update.device must be Unicode text, got a lone surrogate"),
    (update(device=7), "update.device must be a string, got 7"),
    (update(metrics={"loss": float("inf")}), r"update.metrics\['loss'\] must be a finite number, got inf"),
    (update(metrics={"loss": 10**400}), r"update.metrics\['loss'\] must be a finite number"),
    (update(metrics={"x" * 1025: 1.0}), "a name in update.metrics must be <= 1024 characters, got 1025"),
    (update(cost=Cost(seconds=float("nan"))), "update.cost.seconds must be a finite number, got nan"),
    (update(cost=Cost(peak_rss_bytes=-1)), "update.cost.peak_rss_bytes must be an integer"),
    (update(payload=Payload(dense={"s": np.array(1.0)})), r"dense 's' must have 1..4 dimensions, each >= 1, got \[\]"),
    (update(payload=Payload(dense={"s": np.ones((2, 0))})), r"dense 's' must have 1..4 .* got \[2, 0\]"),
    (update(payload=Payload(dense={"s": np.array([np.nan])})), r"dense 's' must be finite, got nan at \[0\]"),
    (task(rank=2**31), "task.rank must be an integer in 0..2147483647"),
    (task(rank=True), "task.rank must be an integer"),
    (task(send=1), "task.send must be True or False, got 1"),
    (task(wire="fp8"), "wire must be one of fp32, fp16, bf16, int8, got 'fp8'"),
    (task(start_from="home"), "task.start_from must be one of fresh, patch, given, own, got 'home'"),
    (task(alpha=float("nan")), "task.alpha must be a finite number, got nan"),
    (task(seed=-1), "task.seed must be an integer in 0..18446744073709551615, got -1"),
    (task(shared_a_seed=-1), "task.shared_a_seed must be an integer in 0..18446744073709551615, got -1"),
    (task(knobs={"k": 2**63}), r"task.knobs\['k'\] must be an integer in -9223372036854775808..9223372036854775807"),
    (task(knobs={"k": None}), r"task.knobs\['k'\] must be an int, a float, a bool or a string, got None"),
    (task(knobs={"k": "x" * 1025}), r"task.knobs\['k'\] must be <= 1024 characters"),
    (
        task(patch=Patch(base_hash="h", since=3, version=2, payload=Payload())),
        "patch.since must be <= patch.version, got 3 and 2",
    ),
    (hello({"rank": -1}), "report.rank must be an integer"),
    (
        hello({"capabilities": ("backprop", "backprop")}),
        "names in report.capabilities must differ, got 'backprop' twice",
    ),
    (hello(spec={"matrices": {"q": MatrixSpec(d_out=0, d_in=1)}}), "d_out of 'q' must be an integer in 1"),
    (hello(spec={"dense": {"n": (2, 0)}}), r"dense 'n' must have 1..4 dimensions, each >= 1, got \[2, 0\]"),
    (hello(spec={"dense": {"n": (2**64,)}}), "a length of dense 'n' must be an integer"),
    (Refusal(device="d", round=0, reason="x" * 1025), "refusal.reason must be <= 1024 characters"),
    (Payload(), "message must be a Task, Update, Hello, Refusal, got Payload"),
]


@pytest.mark.parametrize(("message", "match"), BAD_MESSAGES, ids=[match[:50] for _, match in BAD_MESSAGES])
def test_bad_messages_are_not_sent(message: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode(message)


def test_a_factor_needs_a_positive_alpha_to_travel() -> None:
    factor = replace(payload().factors["q"], alpha=-2.0)
    with pytest.raises(ValueError, match=r"alpha of 'q' must be > 0, got -2.0"):
        encode(update(payload=Payload(factors={"q": factor})))


@pytest.mark.parametrize("make", [lambda: encode(update(), wire="fp64"), lambda: TaskEncoder("fp64")])
def test_unknown_wires_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="wire must be one of fp32, fp16, bf16, int8, got 'fp64'"):
        make()


def test_a_large_body_is_not_sent() -> None:
    metrics = {f"{index:01000d}": 1.0 for index in range(9000)}
    with pytest.raises(ValueError, match="a message without its tensor data must be <= 8388608 bytes"):
        encode(update(metrics=metrics))


def test_huge_shapes_cost_no_memory() -> None:
    frame = forged(UPDATE, lambda record: set_shape(record.payload.dense[0].tensor, 2**62, 2**62, 2**62, 2**62))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"shapes of update.payload need"):
            decode(frame, Update, limit=LIMIT)
        with pytest.raises(ValueError, match="bytes it announces"):
            decode(patched(frame, 8, "<I", framing.BODY_LIMIT), Update, limit=2**63)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_int8_decodes_to_at_most_four_bytes_a_byte() -> None:
    sent = update(payload=Payload(dense={"w": np.ones((1, 500_000), np.float32)}))
    frame = encode(sent, wire="int8")
    tracemalloc.start()
    try:
        decode(frame, Update, limit=LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(frame)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_truncation_anywhere_is_refused(wire: str) -> None:
    frame = encode(update(metrics={"loss": 0.5}), wire=wire)
    for length in range(len(frame)):
        with pytest.raises(ValueError, match="must"):
            decode(frame[:length], Update, limit=LIMIT)


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_every_damaged_byte_is_noticed(wire: str) -> None:
    frame = encode(task(start=payload(), patch=Patch(base_hash="h", since=0, version=1, payload=payload())), wire=wire)
    for place in range(len(frame)):
        for flip in (0x01, 0x80, 0xFF):
            with pytest.raises(ValueError, match=r"must|speaks"):
                decode(patched(frame, place, "B", frame[place] ^ flip), Task, limit=LIMIT)


def survives(frame: bytes, expect: Any) -> bool:
    """Whether a frame decodes; anything but a ValueError of one line fails the test."""
    try:
        decode(frame, expect, limit=LIMIT)
    except ValueError as error:
        problem = str(error)
    else:
        return True
    assert "\n" not in problem
    return False


def test_random_bytes_are_refused() -> None:
    rng = np.random.default_rng(0)
    header = encode(update())[:8]
    for length in rng.integers(0, 200, 20_000):
        noise = rng.bytes(int(length))
        assert not survives(noise, Update)
        assert not survives(header + noise, Update)


def test_damaged_records_behind_right_checksums_never_crash(message: Any) -> None:
    """What an attacker can do who knows the format: altered bodies, framed again."""
    kind = [Task, Update, Hello, Refusal].index(type(message)) + 1
    body, data = framing.unpack(encode(message), kind, [type(message).__name__] * 5, limit=LIMIT)
    rng = np.random.default_rng(kind)
    decoded = 0
    for _ in range(5_000):
        altered = bytearray(body)
        for _ in range(rng.integers(1, 4)):
            place = int(rng.integers(len(altered)))
            altered[place : place + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3)))
        decoded += survives(framing.pack(kind, bytes(altered), [bytes(data)]), type(message))
    assert decoded < 5_000


def test_random_tensor_data_behind_a_right_checksum_never_crashes() -> None:
    rng = np.random.default_rng(5)
    for wire in ("fp32", "fp16", "bf16", "int8"):
        sent = update(payload=Payload(dense={"w": np.ones((3, 4), np.float32)}))
        body, data = framing.unpack(encode(sent, wire=wire), UPDATE, ["", "", "Update"], limit=LIMIT)
        for _ in range(1_000):
            noise = rng.bytes(len(data))
            record = pb.Update.FromString(body)
            recounted(record, noise)
            survives(framing.pack(UPDATE, record.SerializeToString(deterministic=True), [noise]), Update)


def test_messages_of_errors_are_one_line() -> None:
    frame = forged(UPDATE, lambda record: record.metrics.add(name="a\nb", value=float("nan")))
    match = re.escape(r"a name in update.metrics must be one line without control characters, got 'a\nb'")
    with pytest.raises(ValueError, match=match):
        decode(frame, Update, limit=LIMIT)
