"""Groups of a spec and keep-bitmaps of a payload: what travels, and what a stranger may not say."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import framing, validate
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import (
    Axis,
    DeviceReport,
    Hello,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Patch,
    Payload,
    Start,
    Task,
    Update,
)

LIMIT = 64 << 20
KINDS: dict[type[Any], tuple[int, type[Any]]] = {Task: (1, pb.Task), Update: (2, pb.Update), Hello: (3, pb.Hello)}


def payload(**keep: Any) -> Payload:
    ones = np.ones((2, 1), np.float32)
    bits = {name: np.array(value, bool) for name, value in keep.items()}
    return Payload(factors={"q": LowRank(b=ones, a=ones.T, alpha=1.0)}, keep=bits)


def update(**keep: Any) -> Update:
    return Update(device="d", round=1, examples=1, payload=payload(**keep))


def task(**fields: Any) -> Task:
    return Task(**({"device": "d", "round": 1, "rank": 4, "alpha": 8.0, "start_from": Start.FRESH} | fields))


def hello(axis: Axis | None = None, groups: Any = None, side: str = "rows") -> Hello:
    matrix = MatrixSpec(d_out=12, d_in=9, **({side: axis} if axis else {}))
    spec = ModelSpec(base_hash="h", matrices={"q": matrix}, groups={"heads": 3} if groups is None else groups)
    return Hello(report=DeviceReport(device="d", examples=1, rank=2), spec=spec)


def forged(message: Any, change: Callable[[Any], Any]) -> bytes:
    """A frame with right checksums around a record that `change` has altered."""
    kind, record_type = KINDS[type(message)]
    body, data = framing.unpack(encode(message), kind, ["", "Task", "Update", "Hello"], limit=LIMIT)
    record = record_type.FromString(body)
    change(record)
    return framing.pack(kind, record.SerializeToString(deterministic=True), [data])


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.lists(st.booleans(), min_size=1, max_size=40).filter(any), max_size=4))
def test_any_keep_survives_in_an_eighth_of_a_byte_a_unit(sizes: list[list[bool]]) -> None:
    keep = {f"g{i}": np.array(bits) for i, bits in enumerate(sizes)}
    for message in (
        Update(device="d", round=1, examples=1, payload=Payload(keep=keep)),
        task(start=Payload(keep=keep), patch=Patch(base_hash="h", since=0, version=1, payload=Payload(keep=keep))),
    ):
        decoded = decode(encode(message), type(message), limit=LIMIT)
        parts = [decoded.payload] if isinstance(decoded, Update) else [decoded.start, decoded.patch.payload]
        for part in parts:
            assert list(part.keep) == list(keep)
            for name, bits in keep.items():
                np.testing.assert_array_equal(part.keep[name], bits)
                assert part.keep[name].dtype == np.bool_
                assert not part.keep[name].flags.writeable


def test_a_keep_costs_a_bit_a_unit() -> None:
    sizes = [len(encode(update(channels=np.arange(units) % 2 == 0))) for units in (2**14, 2**15)]
    assert sizes[1] - sizes[0] == 2**14 // 8


def test_messages_without_masks_are_the_bytes_they_were() -> None:
    """No keep, groups or ranks adds nothing: a peer that knows none of them reads the frame."""
    for message in (update(), task(), hello(groups={})):
        kind, record_type = KINDS[type(message)]
        body, _ = framing.unpack(encode(message), kind, ["", "Task", "Update", "Hello"], limit=LIMIT)
        text = str(record_type.FromString(body))
        assert not any(word in text for word in ("keep", "groups", "ranks", "rows", "columns"))


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_axes_survive(side: str) -> None:
    for axis in (
        Axis(group="heads", width=1, offsets=(0, 3, 6)),
        Axis(group="heads", width=3),
        Axis(group="heads", width=1, offsets=(1, 5)),
    ):
        sent = hello(axis, {"heads": 3, "other": 2**24 - 3}, side)
        assert decode(encode(sent), Hello, limit=LIMIT) == sent


def test_ranks_survive_and_scale_alpha() -> None:
    sent = decode(encode(task(ranks={"v": 8, "q": 2})), Task, limit=LIMIT)
    assert list(sent.ranks.items()) == [("v", 8), ("q", 2)]
    assert [(sent.rank_of(name), sent.alpha_of(name)) for name in ("v", "q", "o")] == [(8, 16.0), (2, 4.0), (0, 0.0)]
    assert (task().rank_of("any"), task().alpha_of("any")) == (4, 8.0)


def put(record: Any, units: int, bits: bytes, name: str = "g") -> None:
    record.payload.keep.add(name=name, units=units, bits=bits)


KEEP_FORGERIES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda r: put(r, 9, b"\xff"), r"update.payload.keep\['g'\]: 9 bits must have 2 bytes, got 1"),
    (lambda r: put(r, 9, b"\xff\xff\x00"), "9 bits must have 2 bytes, got 3"),
    (lambda r: put(r, 9, b"\xff\x03"), "what follows 9 bits in their last byte must be zero, got 0x03"),
    (lambda r: put(r, 8, b"\x00"), r"update.payload.keep\['g'\] must keep at least one unit, got none"),
    (lambda r: put(r, 0, b""), r"units of update.payload.keep\['g'\] must be an integer in 1..16777216, got 0"),
    (lambda r: put(r, 2**60, b"\x01"), r"must be an integer in 1..16777216, got 1152921504606846976"),
    (lambda r: [put(r, 8, b"\x01") for _ in range(2)], "names in update.payload.keep must differ, got 'g' twice"),
    (lambda r: put(r, 8, b"\x01", "a\nb"), "a name in update.payload.keep must be one line"),
    (
        lambda r: [put(r, 2**23, b"\x01", name) for name in "abc"],
        "update.payload.keep must have <= 16777216 units in all, got 25165824",
    ),
    (
        lambda r: [put(r, 1, b"\x01", str(i)) for i in range(100_001)],
        "update.payload.keep must have <= 100000 entries, got 100001",
    ),
]


@pytest.mark.parametrize(("change", "match"), KEEP_FORGERIES, ids=[match[-40:] for _, match in KEEP_FORGERIES])
def test_forged_keeps_are_refused(change: Callable[[Any], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decode(forged(update(), change), Update, limit=LIMIT)


def rows(record: Any) -> Any:
    return record.spec.matrices[0].rows


AXIS = Axis(group="heads", width=2, offsets=(0, 6))
SPEC_FORGERIES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda r: setattr(rows(r), "group", "legs"), "group of rows of 'q' must be one of spec.groups, got 'legs'"),
    (lambda r: r.spec.ClearField("groups"), "group of rows of 'q' must be one of spec.groups, got 'heads'"),
    (lambda r: setattr(rows(r), "width", 0), "width of rows of 'q' must be an integer in 1"),
    (lambda r: setattr(rows(r), "width", 3), r"offsets of rows of 'q' must ascend by 9 or more, got \[0, 6\]"),
    (lambda r: setattr(rows(r), "width", 2**62), "offsets of rows of 'q' must ascend by 13835058055282163712 or more"),
    (
        lambda r: rows(r).offsets.__setitem__(1, 7),
        "units of rows of 'q' must lie within its 12 indices, got an end of 13",
    ),
    (lambda r: rows(r).offsets.__setitem__(1, 5), r"must ascend by 6 or more, got \[0, 5\]"),
    (lambda r: rows(r).offsets.__setitem__(0, 2**64 - 1), "an offset of rows of 'q' must be an integer in 0"),
    (lambda r: rows(r).offsets.reverse(), r"must ascend by 6 or more, got \[6, 0\]"),
    (lambda r: rows(r).ClearField("offsets"), "rows of 'q' must have 1..16 offsets, got 0"),
    (lambda r: rows(r).offsets.extend([12] * 15), "rows of 'q' must have 1..16 offsets, got 17"),
    (lambda r: r.spec.matrices[0].columns.CopyFrom(rows(r)), "units of columns of 'q' must lie within its 9 indices"),
    (lambda r: rows(r).Clear(), "group of rows of 'q' must be one of spec.groups, got ''"),
    (lambda r: setattr(r.spec.groups[0], "units", 0), r"units of spec.groups\['heads'\] must be an integer in 1"),
    (lambda r: setattr(r.spec.groups[0], "units", 2**40), r"units of spec.groups\['heads'\] must be an integer in 1"),
    (lambda r: r.spec.groups.add(name="heads", units=3), "names in spec.groups must differ, got 'heads' twice"),
    (lambda r: r.spec.groups.add(name="b", units=2**24), "spec.groups must have <= 16777216 units in all"),
]


@pytest.mark.parametrize(("change", "match"), SPEC_FORGERIES, ids=[match[-40:] for _, match in SPEC_FORGERIES])
def test_forged_specs_are_refused(change: Callable[[Any], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decode(forged(hello(AXIS), change), Hello, limit=LIMIT)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.ranks.add(name="q", rank=0), r"task.ranks\['q'\] must be an integer in 1..2147483647, got 0"),
        (lambda r: r.ranks.add(name="q", rank=2**31), r"task.ranks\['q'\] must be an integer in 1"),
        (lambda r: [r.ranks.add(name="q", rank=1) for _ in range(2)], "names in task.ranks must differ, got 'q' twice"),
        (lambda r: (r.ranks.add(name="q", rank=1), setattr(r, "rank", 0)), "task.rank must be >= 1 where task.ranks"),
    ],
)
def test_forged_ranks_are_refused(change: Callable[[Any], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decode(forged(task(), change), Task, limit=LIMIT)


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (update(heads=[0, 0]), r"update.payload.keep\['heads'\] must keep at least one unit, got none"),
        (update(heads=[]), r"units of update.payload.keep\['heads'\] must be an integer in 1..16777216, got 0"),
        (update(heads=[[1, 0]]), r"must be a vector of bool, got bool of shape \[1, 2\]"),
        (
            Update(device="d", round=1, examples=1, payload=Payload(keep={"g": np.ones(3)})),  # type: ignore[dict-item]
            "must be a vector of bool, got float64 of shape",
        ),
        (task(ranks={"q": 1.5}), r"task.ranks\['q'\] must be an integer"),
        (hello(Axis(group="heads", width=5)), "units of rows of 'q' must lie within its 12 indices, got an end of 15"),
    ],
)
def test_bad_masks_are_not_sent(message: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode(message)


def test_announced_units_cost_no_memory() -> None:
    frame = forged(update(), lambda r: [put(r, 2**23, b"\x01", name) for name in "ab"])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="8388608 bits must have 1048576 bytes, got 1"):
            decode(frame, Update, limit=LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


def test_a_keep_must_be_of_the_models_groups() -> None:
    good = {"heads": np.array([True, False, True])}
    validate.check_keep("keep", good, {"heads": 3, "channels": 5})
    validate.check_keep("keep", {}, {})
    with pytest.raises(ValueError, match="keep must name groups of the model, got 'heads'"):
        validate.check_keep("keep", good, {"channels": 5})
    with pytest.raises(ValueError, match=r"keep\['heads'\] must have 4 units, got 3"):
        validate.check_keep("keep", good, {"heads": 4})
    with pytest.raises(ValueError, match=r"keep\['heads'\] must keep at least one unit, got none"):
        validate.check_keep("keep", {"heads": np.zeros(3, bool)}, {"heads": 3})
