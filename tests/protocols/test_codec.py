"""What goes in comes out: every message, every field, every dtype, the same bytes each time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedloom.protocols.codec import TaskEncoder, decode, decode_answer, encode
from fedloom.protocols.messages import Hello, Kind, LowRank, Patch, Payload, Refusal, Start, Subspace, Task, Update

LIMIT = 1 << 20
WIRES = ("fp32", "fp16", "bf16", "int8")


def small_task(**changes: Any) -> Task:
    factor = LowRank(
        b=np.array([[1.0], [-2.0]], np.float32), a=np.array([[3.0, 0.5]], np.float32), alpha=2.0, rslora=True
    )
    start = Payload(factors={"q": factor}, dense={"n": np.array([0.25], np.float32)})
    base: dict[str, Any] = {
        "device": "d",
        "round": 1,
        "rank": 1,
        "alpha": 2.0,
        "start_from": Start.GIVEN,
        "start": start,
    }
    return Task(**(base | changes))


def test_every_field_of_every_message_survives(message: Any, as_plain: Callable[[Any], Any]) -> None:
    decoded = decode(encode(message), type(message), limit=LIMIT)
    assert as_plain(decoded) == as_plain(message)


def test_the_messages_tested_have_no_field_at_its_default(message: Any) -> None:
    def check(value: Any) -> None:
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if isinstance(held, Subspace):
                continue  # no scope allows all of its fields: see test_subspaces_survive
            if dataclasses.is_dataclass(held):
                check(held)
            elif default is not dataclasses.MISSING and not isinstance(held, np.ndarray):
                assert held != default, f"{type(value).__name__}.{field.name}"

    check(message)


@pytest.mark.parametrize(
    "name",
    [field.name for field in dataclasses.fields(Task) if isinstance(field.default, bool | str | int | float | None)],
)
def test_fields_of_a_task_do_not_cross(name: str, task: Task, as_plain: Callable[[Any], Any]) -> None:
    changed = replace(small_task(), **{name: getattr(task, name)})
    assert as_plain(decode(encode(changed), Task, limit=LIMIT)) == as_plain(changed)
    assert as_plain(changed) != as_plain(small_task())


@pytest.mark.parametrize("start", list(Start))
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("wire", WIRES)
def test_enums_survive(start: Start, kind: Kind, wire: str) -> None:
    decoded = decode(encode(small_task(start_from=start, kind=kind, wire=wire)), Task, limit=LIMIT)
    assert (decoded.start_from, decoded.kind, decoded.wire) == (start, kind, wire)


def test_knobs_keep_their_type() -> None:
    knobs = {"i": -3, "zero": 0, "f": 3.0, "s": "3", "empty": "", "t": True, "least": -(2**63), "minus": -0.0}
    decoded = decode(encode(small_task(knobs=knobs)), Task, limit=LIMIT).knobs
    assert decoded == knobs
    assert [type(value) for value in decoded.values()] == [type(value) for value in knobs.values()]


def test_seed_and_nonce_take_all_64_bits() -> None:
    decoded = decode(encode(small_task(seed=2**64 - 1, nonce=2**64 - 2)), Task, limit=LIMIT)
    assert (decoded.seed, decoded.nonce) == (2**64 - 1, 2**64 - 2)


def test_no_patch_and_an_empty_patch_differ() -> None:
    empty = Patch(base_hash="x", since=0, version=0, payload=Payload())
    assert decode(encode(small_task()), Task, limit=LIMIT).patch is None
    assert decode(encode(small_task(patch=empty)), Task, limit=LIMIT).patch == empty


@pytest.mark.parametrize("wire", WIRES)
def test_an_a_that_both_sides_know_travels_empty(wire: str) -> None:
    factor = LowRank(b=np.ones((3, 2), np.float32), a=np.empty((2, 0), np.float32), alpha=1.0)
    update = Update(device="d", round=1, examples=1, payload=Payload(factors={"q": factor}))
    decoded = decode(encode(update, wire=wire), Update, limit=LIMIT).payload.factors["q"]
    assert (decoded.a.shape, decoded.a.dtype) == ((2, 0), np.float32)
    np.testing.assert_allclose(decoded.b, factor.b, rtol=1e-6)


def test_a_seed_of_zero_is_not_the_absence_of_one() -> None:
    for seed in (None, 0, 2**64 - 1):
        assert decode(encode(small_task(shared_a_seed=seed)), Task, limit=LIMIT).shared_a_seed == seed


def test_fp32_decodes_to_read_only_views_of_the_frame() -> None:
    frame = encode(small_task())
    a = decode(frame, Task, limit=LIMIT).start.factors["q"].a
    assert np.shares_memory(a, np.frombuffer(frame, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        a[0, 0] = 1.0


def test_float64_and_strided_arrays_travel_as_float32() -> None:
    wide = np.arange(24, dtype=np.float64).reshape(4, 6)[::2, ::-3] / 3
    update = Update(device="d", round=1, examples=1, payload=Payload(dense={"w": wide}))
    decoded = decode(encode(update), Update, limit=LIMIT).payload.dense["w"]
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, wide.astype(np.float32))


def floats(shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    return hnp.arrays(np.float32, shape, elements=st.floats(-60000, 60000, width=32))


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12)
SIDES = st.integers(1, 5)


@st.composite
def payloads(draw: st.DrawFn) -> Payload:
    factors = {}
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        d_out, rank, d_in = draw(st.tuples(SIDES, SIDES, SIDES))
        alpha = draw(st.floats(1e-3, 1e6))
        factors[name] = LowRank(b=draw(floats((d_out, rank))), a=draw(floats((rank, d_in))), alpha=alpha)
    shapes = draw(st.lists(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4), max_size=3))
    return Payload(factors=factors, dense={f"dense {i}": draw(floats(shape)) for i, shape in enumerate(shapes)})


def allowed(x: Any, wire: str, axis: int | None) -> Any:
    """The largest error that a wire may make in each value."""
    others = tuple(place for place in range(x.ndim) if place != axis)
    return {
        "fp32": np.zeros_like(x),
        "fp16": np.maximum(abs(x) * 2.0**-11, 2.0**-25),
        "bf16": np.maximum(abs(x) * 2.0**-8, 2.0**-134),
        "int8": np.maximum(abs(x).max(axis=others, keepdims=True) / 127, 2.0**-126) * 1.00001 + 0 * x,
    }[wire]


@settings(max_examples=100, deadline=None)
@given(payload=payloads(), wire=st.sampled_from(WIRES), seed=st.integers(0, 2**64 - 1))
def test_any_payload_survives_any_wire(payload: Payload, wire: str, seed: int) -> None:
    update = Update(device="d", round=1, examples=1, payload=payload)
    frame = encode(update, wire=wire, seed=seed)
    decoded = decode(frame, Update, limit=LIMIT).payload
    assert encode(update, wire=wire, seed=seed) == frame
    assert list(decoded.factors) == list(payload.factors)
    assert list(decoded.dense) == list(payload.dense)
    pairs = [(decoded.dense[name], x, None if x.ndim == 1 else 0) for name, x in payload.dense.items()]
    for name, factor in payload.factors.items():
        assert decoded.factors[name].alpha == factor.alpha
        pairs += [(decoded.factors[name].b, factor.b, 1), (decoded.factors[name].a, factor.a, 0)]
    for got, sent, axis in pairs:
        assert got.shape == sent.shape
        assert got.dtype == np.float32
        assert (abs(got.astype(np.float64) - sent) <= allowed(sent, wire, axis)).all()


@settings(max_examples=100, deadline=None)
@given(
    metrics=st.dictionaries(NAMES, st.floats(allow_nan=False, allow_infinity=False), max_size=4),
    knobs=st.dictionaries(
        NAMES,
        st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | NAMES | st.booleans(),
    ),
    reason=st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=1024),
)
def test_any_scalars_survive(metrics: Any, knobs: Any, reason: str) -> None:
    update = Update(device="d", round=0, examples=0, metrics=metrics)
    assert decode(encode(update), Update, limit=LIMIT).metrics == metrics
    assert repr(decode(encode(small_task(knobs=knobs)), Task, limit=LIMIT).knobs) == repr(knobs)
    refusal = Refusal(device="d", round=0, reason=reason)
    assert decode(encode(refusal), Refusal, limit=LIMIT) == refusal


def test_golden_frame() -> None:
    """The bytes of protocol version 3. Printed by `encode(small_task()).hex()`; a change to them is a change of the
    protocol and needs a new PROTOCOL_VERSION once this one is released."""
    golden = """
        46444c4d0300010058000000fd16a810
        0000803f000000c00000000000000000000040400000003f0000000000000000
        0000803e000000000000000000000000
        0a016410011801210000000000000040280330013a046c6f72614801580162350a200a017110011900000000000000402001
        2a060801120202013206080112020102120a0a016e12050801120101183025cc2aa139900101
    """
    assert encode(small_task()) == bytes.fromhex(golden)
    assert encode(decode(bytes.fromhex(golden), Task, limit=LIMIT)) == encode(small_task())


def test_an_answer_may_be_either_of_two() -> None:
    update, refusal = Update(device="d", round=1, examples=2), Refusal(device="d", round=1, reason="busy")
    assert decode_answer(encode(update), (Update, Refusal), limit=LIMIT) == update
    assert decode_answer(encode(refusal), (Update, Refusal), limit=LIMIT) == refusal
    with pytest.raises(ValueError, match="frame must hold Update, got Task"):
        decode_answer(encode(small_task()), (Update, Refusal), limit=LIMIT)
    with pytest.raises(ValueError, match="a frame must have at least 16 bytes, got 3"):
        decode_answer(b"abc", (Hello, Refusal), limit=LIMIT)


@pytest.mark.parametrize("wire", WIRES)
def test_a_task_encoder_makes_the_same_bytes(wire: str, task: Task) -> None:
    encoder, count = TaskEncoder(wire, seed=5), itertools.count()
    shared = task.patch
    for round in (1, 1, 2):
        start = Payload(dense={"w": np.full(5, next(count) + 0.3, np.float32)})
        one = small_task(round=round, start=start, patch=shared)
        assert encoder.encode(one) == encode(one, wire=wire, seed=5)


def test_a_task_encoder_packs_a_shared_payload_once(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    from fedloom.protocols import codec

    packed: list[Payload] = []
    real = codec.pack_payload
    monkeypatch.setattr(codec, "pack_payload", lambda payload, *rest: packed.append(payload) or real(payload, *rest))
    encoder = TaskEncoder("fp32", keep=2)
    starts = [Payload(dense={"w": np.full(2, i, np.float32)}) for i in range(5)]
    for start in starts:
        encoder.encode(small_task(start=start, patch=task.patch))
    assert task.patch is not None
    assert sum(payload is task.patch.payload for payload in packed) == 1
    assert len(packed) == 6
    encoder.encode(small_task(start=starts[0], patch=task.patch))
    assert len(packed) == 7


def test_int8_rounds_independently_across_devices_rounds_and_seeds() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    sent = Update(device="a", round=1, examples=1, payload=Payload(dense={"w": x}))
    others = [replace(sent, device="b"), replace(sent, round=2)]
    first = decode(encode(sent, wire="int8", seed=1), Update, limit=LIMIT).payload.dense["w"]
    frames = [encode(other, wire="int8", seed=1) for other in others] + [encode(sent, wire="int8", seed=2)]
    for frame in frames:
        again = decode(frame, Update, limit=LIMIT).payload.dense["w"]
        assert 0.1 < float((again != first).mean()) < 0.6
