"""Subspaces, scalars and coefficients in whole messages: every field, exact sizes, and what strangers may not send."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import framing
from fedloom.protocols.codec import TaskEncoder, decode, encode
from fedloom.protocols.messages import (
    Coefficients,
    Cost,
    LowRank,
    Over,
    Patch,
    Payload,
    Scalars,
    Scope,
    Start,
    Subspace,
    Task,
    Update,
)

LIMIT = 1 << 20
WIRES = ("fp32", "fp16", "bf16", "int8")
SHA = hashlib.sha256(b"base").hexdigest()
SKETCH = Subspace(family="sketch", k=8, seed=5)
LORA = replace(SKETCH, scope=Scope.LORA, rank=4, alpha=8.0)
POOL = Scalars(over=Over.POOL, k=5, values=np.float32([1, -2, 3]), indices=np.array([4, 0, 3]))


def update(scalars: Scalars | None = POOL, **changes: Any) -> Update:
    return Update(**({"device": "d", "round": 1, "examples": 1, "payload": Payload(scalars=scalars)} | changes))


def task(coefficients: Coefficients | None = None, **changes: Any) -> Task:
    patch = Patch(base_hash=SHA, since=0, version=1, payload=Payload(coefficients=coefficients))
    base = {"device": "d", "round": 1, "rank": 0, "alpha": 1.0, "start_from": Start.FRESH, "patch": patch}
    return Task(**(base | changes))


def coefficients(steps: Any = (1, 0, -2, 0, 0, 7, 0, 0), **changes: Any) -> Coefficients:
    return Coefficients(**({"subspace": SKETCH, "exponent": -3, "steps": np.array(steps)} | changes))


def sent(scalars: Scalars, wire: str = "fp32", seed: int = 0) -> Scalars:
    got = decode(encode(update(scalars), wire=wire, seed=seed), Update, limit=1 << 26).payload.scalars
    assert got is not None
    return got


SUBSPACES = [
    SKETCH,
    Subspace(family="gaussian", k=1, seed=0),
    Subspace(family="rademacher", k=2**20, seed=2**64 - 1, directions=2**40),
    LORA,
    replace(LORA, rslora=True, rank=2**31 - 1),
    replace(SKETCH, scope=Scope.MASK, mask=SHA),
]


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_subspaces_survive(subspace: Subspace) -> None:
    """One that this package cannot draw, too: the device's refusal says more than a damaged frame would."""
    decoded = decode(encode(task(subspace=subspace, scalar_limit=0.5)), Task, limit=LIMIT)
    assert (decoded.subspace, decoded.scalar_limit) == (subspace, 0.5)
    at = Coefficients(subspace=subspace, exponent=1, steps=np.zeros(subspace.k, np.int64))
    patch = decode(encode(task(at)), Task, limit=LIMIT).patch
    assert patch is not None
    assert patch.payload.coefficients is not None
    assert patch.payload.coefficients.subspace == subspace


@st.composite
def scalars(draw: st.DrawFn) -> Scalars:
    over, k = draw(st.sampled_from(Over)), draw(st.integers(1, 40))
    n = k if over == Over.BASIS else draw(st.integers(1, 40))
    values = draw(hnp.arrays(np.float32, n, elements=st.floats(-60000, 60000, width=32)))
    indices = draw(hnp.arrays(np.int64, n, elements=st.integers(0, k - 1))) if over == Over.POOL else None
    return Scalars(over=over, k=k, values=values, indices=indices, seed=draw(st.integers(0, 2**64 - 1)))


@settings(max_examples=200, deadline=None)
@given(one=scalars(), wire=st.sampled_from(WIRES), seed=st.integers(0, 2**63))
def test_any_scalars_survive_any_wire(one: Scalars, wire: str, seed: int) -> None:
    got = sent(one, wire, seed)
    assert (got.over, got.k, got.seed, got.values.dtype) == (one.over, one.k, one.seed, np.float32)
    assert (got.indices is None) == (one.indices is None)
    if got.indices is not None and one.indices is not None:
        np.testing.assert_array_equal(got.indices, one.indices)
    step = max(float(abs(one.values).max()) / 127 * 1.00001, 2.0**-126)
    error = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 0.0}[wire]
    floor = {"fp32": 0.0, "fp16": 2.0**-25, "bf16": 2.0**-134, "int8": step}[wire]
    assert (abs(got.values.astype(np.float64) - one.values) <= error * abs(one.values) + floor).all()
    assert encode(update(one), wire=wire, seed=seed) == encode(update(one), wire=wire, seed=seed)


@settings(max_examples=100, deadline=None)
@given(steps=hnp.arrays(np.int64, 8, elements=st.integers(1 - 2**53, 2**53 - 1)), exponent=st.integers(-1074, 970))
@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_coefficients_survive_any_wire_exactly(wire: str, steps: Any, exponent: int) -> None:
    one = coefficients(steps, exponent=exponent)
    patch = decode(encode(task(one), wire=wire, seed=1), Task, limit=LIMIT).patch
    assert patch is not None
    got = patch.payload.coefficients
    assert got is not None
    np.testing.assert_array_equal(got.steps, steps)
    np.testing.assert_array_equal(got.values(), one.values())
    assert np.isfinite(got.values()).all()


def data_bytes(message: Any, kind: int, wire: str) -> int:
    return len(framing.unpack(encode(message, wire=wire), kind, [""] * 3, limit=LIMIT)[1])


@pytest.mark.parametrize(("wire", "values"), [("fp32", 800), ("fp16", 400), ("bf16", 400), ("int8", 204)])
def test_scalars_take_exactly_their_bits(wire: str, values: int) -> None:
    rng = np.random.default_rng(0)
    one = Scalars(over=Over.POOL, k=4096, values=rng.normal(size=200), indices=rng.integers(0, 4096, 200))
    assert data_bytes(update(one), 2, wire) == values + 300
    assert data_bytes(update(replace(one, k=4097)), 2, wire) == values + 325
    assert data_bytes(update(replace(one, k=1, indices=np.zeros(200, np.int64))), 2, wire) == values
    assert data_bytes(update(replace(one, over=Over.STEPS, indices=None)), 2, wire) == values


def test_equal_values_over_a_pool_travel_as_one() -> None:
    indices = np.arange(200) % 7
    one = Scalars(over=Over.POOL, k=4096, values=np.full(200, 0.3, np.float32), indices=indices)
    assert data_bytes(update(one), 2, "fp32") == 4 + 300
    np.testing.assert_array_equal(sent(one).values, one.values)
    np.testing.assert_array_equal(sent(one).drawn(), indices)
    signed = replace(one, values=np.where(indices == 3, np.float32(-0.0), np.float32(0.0)))
    assert data_bytes(update(signed), 2, "fp32") == 800 + 300
    np.testing.assert_array_equal(np.signbit(sent(signed).values), indices == 3)


def test_a_round_takes_less_than_two_kilobytes() -> None:
    """K = 4096, 200 local steps: what a device is sent and what it answers, together, names and all."""
    rng = np.random.default_rng(0)
    subspace = Subspace(family="sketch", k=4096, seed=2**63 - 25)
    down = task(
        Coefficients(subspace=subspace, exponent=-20, steps=np.rint(rng.normal(0, 1, 4096)).astype(np.int64)),
        device="device-007",
        round=12,
        tuner="zeroth_order",
        subspace=subspace,
        scalar_limit=0.125,
        run=SHA[:16],
        nonce=2**62 + 12345,
        seed=2**61 + 54321,
        wire="int8",
        knobs={"lr": 1e-4, "steps": 200, "eps": 5e-4, "batch_size": 1},
    )
    up = update(
        Scalars(over=Over.POOL, k=4096, values=rng.normal(size=200), indices=rng.integers(0, 4096, 200)),
        device="device-007",
        round=12,
        examples=87,
        run=SHA[:16],
        nonce=2**62 + 12345,
        metrics={"loss_sum": 1532.52423, "tokens": 11234.0, "n": 56.0, "steps": 200.0},
        cost=Cost(seconds=3.14159, peak_rss_bytes=123456789),
    )
    sizes = len(encode(down)), len(encode(up, wire="int8"))
    assert sum(sizes) < 2048
    assert sizes[1] < 670


def test_int8_scalars_are_unbiased() -> None:
    """The mean over n seeds of a value rounded to steps of s has a standard deviation of s sqrt(p (1 - p) / n)."""
    x = np.float32([1.0, -0.3, 0.001, 0.5, 0.9999, -1.0, 1e-5])
    one, n = Scalars(over=Over.STEPS, k=9, values=x), 3_000
    mean = np.mean([sent(one, "int8", seed).values for seed in range(n)], axis=0, dtype=np.float64)
    share = np.mod(x.astype(np.float64) * 127, 1)
    assert (abs(mean - x) <= 5 / 127 * np.sqrt(share * (1 - share) / n) + 2e-7).all()


def test_a_start_of_scalars_and_a_patch_of_factors_share_a_frame() -> None:
    """The scalars' bytes leave the factors unaligned; they are read all the same."""
    factor = LowRank(b=np.float32([[1], [2]]), a=np.float32([[3, 4]]), alpha=1.0)
    patch = Patch(base_hash="b", since=0, version=1, payload=Payload(factors={"q": factor}, scalars=POOL))
    both = task(start=Payload(scalars=POOL), patch=patch, start_from=Start.GIVEN)
    got = decode(encode(both), Task, limit=LIMIT)
    assert got.patch is not None
    np.testing.assert_array_equal(got.patch.payload.factors["q"].dense(), factor.dense())
    assert got.patch.payload.factors["q"].b.flags.aligned
    for payload in (got.start, got.patch.payload):
        assert payload.scalars is not None
        np.testing.assert_array_equal(payload.scalars.values, POOL.values)
        np.testing.assert_array_equal(payload.scalars.indices, POOL.indices)


@pytest.mark.parametrize("wire", WIRES)
def test_a_task_encoder_makes_the_same_bytes(wire: str) -> None:
    encoder, one = TaskEncoder(wire, seed=5), task(coefficients(), start=Payload(scalars=POOL))
    for device in ("a", "b"):
        for round in (1, 2):
            changed = replace(one, device=device, round=round)
            assert encoder.encode(changed) == encode(changed, wire=wire, seed=5)


def test_hexadecimal_text_travels_in_half_its_bytes() -> None:
    for text in ("", "a", "ab", "abc", SHA, SHA.upper(), "hash", "0" * 16):
        one = update(run=text)
        assert decode(encode(one), Update, limit=LIMIT).run == text
    plain, packed = (len(encode(task(patch=replace(task().patch, base_hash=text)))) for text in (SHA.upper(), SHA))
    assert plain - packed == 32


BAD: list[tuple[Any, str]] = [
    (task(subspace=replace(SKETCH, family="fourier")), "a family of directions must be one of gaussian, .* 'fourier'"),
    (task(subspace=replace(SKETCH, k=6)), "a sketch must have a power of two of buckets, got 6"),
    (task(subspace=replace(SKETCH, k=0)), "a subspace must have 1..1048576 directions, got 0"),
    (task(subspace=replace(SKETCH, k=2**21)), "a subspace must have 1..1048576 directions, got 2097152"),
    (task(subspace=replace(SKETCH, k=8.0)), "task.subspace.k must be an integer"),
    (task(subspace=replace(SKETCH, seed=2**64)), "task.subspace.seed must be an integer in 0..18446744073709551615"),
    (task(subspace=replace(SKETCH, scope="some")), "task.subspace.scope must be one of all, lora, mask, got 'some'"),
    (task(subspace=replace(SKETCH, directions=-1)), "task.subspace.directions must be an integer"),
    (task(subspace=replace(SKETCH, rank=4)), "a rank >= 1 and an alpha > 0 for scope lora and there alone, got rank 4"),
    (task(subspace=replace(SKETCH, alpha=-1.0)), "for scope lora and there alone, .* alpha -1.0"),
    (task(subspace=replace(SKETCH, rslora=True)), "for scope lora and there alone, .* rslora True for all"),
    (task(subspace=replace(LORA, rank=0)), "for scope lora and there alone, got rank 0"),
    (task(subspace=replace(LORA, alpha=0.0)), "for scope lora and there alone, got rank 4, alpha 0.0"),
    (task(subspace=replace(LORA, alpha=float("nan"))), "task.subspace.alpha must be a finite number, got nan"),
    (task(subspace=replace(LORA, mask=SHA)), "a mask for scope mask and there alone, got '"),
    (task(subspace=replace(SKETCH, scope=Scope.MASK)), "a mask for scope mask and there alone, got ''"),
    (task(subspace=replace(SKETCH, scope=Scope.MASK, mask="ab")), "mask must be 64 lowercase hexadecimal .* got 'ab'"),
    (task(subspace=replace(SKETCH, scope=Scope.MASK, mask=SHA.upper())), "mask must be 64 lowercase hexadecimal"),
    (task(scalar_limit=-0.5), "task.scalar_limit must be >= 0, got -0.5"),
    (task(scalar_limit=float("inf")), "task.scalar_limit must be a finite number, got inf"),
    (update(replace(POOL, values=np.float32([1, np.nan, 3]))), r"scalars must be finite, got nan at \[1\]"),
    (update(replace(POOL, values=np.array([1, 2, 3]))), "scalars must be a float array, got int64"),
    (
        update(replace(POOL, indices=np.array([0, 5, 0]))),
        "indices of update.payload.scalars must be in 0..4, got 0 to 5",
    ),
    (update(replace(POOL, indices=np.array([0, -1, 0]))), "indices of update.payload.scalars must be in 0..4, got -1"),
    (update(replace(POOL, indices=np.zeros(3))), "indices of update.payload.scalars must be integers, got float64"),
    (update(replace(POOL, k=0)), "update.payload.scalars.k must be an integer in 1..1048576, got 0"),
    (update(replace(POOL, k=2**20 + 1)), "update.payload.scalars.k must be an integer in 1..1048576, got 1048577"),
    (update(replace(POOL, seed=-1)), "update.payload.scalars.seed must be an integer"),
    (update(Scalars(over="air", k=5, values=np.ones(2))), "scalars.over must be one of pool, steps, basis, got 'air'"),
    (update(Scalars(over=Over.STEPS, k=5, values=np.empty(0))), "must have 1..4194304 values over steps, got 0"),
    (update(Scalars(over=Over.BASIS, k=5, values=np.zeros(4))), "must have k, 5, values over basis, got 4"),
    (update(Scalars(over=Over.STEPS, k=5, values=np.zeros(2**22 + 1))), "must have 1..4194304 values .* got 4194305"),
    (task(coefficients(exponent=1024)), "coefficients.exponent must be an integer in -1074..1023, got 1024"),
    (task(coefficients(exponent=-1075)), "coefficients.exponent must be an integer in -1074..1023, got -1075"),
    (task(coefficients([0, -(2**53)] * 4)), r"coefficients must lie within \+-9007199254740991, got 9007199254740992"),
    (task(coefficients([0, -(2**63)] * 4)), r"coefficients must lie within \+-9007199254740991, got 92233720368"),
    (task(coefficients([0, 3] * 4, exponent=1023)), r"coefficients must be finite, got 3 x 2\^1023"),
    (task(coefficients(np.zeros(8, np.int32))), "coefficients must be int64, got int32"),
]


@pytest.mark.parametrize(("message", "match"), BAD, ids=[match[:60] for _, match in BAD])
def test_what_breaks_its_bounds_is_not_sent(message: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode(message)


def forged(message: Any, change: Callable[[Any], Any], data: Callable[[bytes], bytes] = bytes) -> bytes:
    """A frame with right checksums around an altered record and altered data."""
    kind, record = (1, pb.Task()) if isinstance(message, Task) else (2, pb.Update())
    body, kept = framing.unpack(encode(message), kind, [""] * 3, limit=LIMIT)
    record.ParseFromString(body)
    change(record)
    altered = data(bytes(kept))
    payload = record.payload if kind == 2 else record.patch.payload
    payload.data_bytes, payload.data_crc32 = len(altered), framing.checksum([altered])
    return framing.pack(kind, record.SerializeToString(deterministic=True), [altered])


def nothing(record: Any) -> None:
    pass


def forge(**fields: Any) -> Callable[[Any], Any]:
    def change(record: Any) -> None:
        for name, value in fields.items():
            setattr(record, name, value)

    return change


SCALARS: list[tuple[Callable[[Any], Any], Callable[[bytes], bytes], str]] = [
    (lambda r: setattr(r, "over", 0), bytes, "scalars.over must be one of pool, steps, basis, got number 0"),
    (lambda r: setattr(r, "over", 2), bytes, "shapes of update.payload need 12 bytes, its tensor data has 14"),
    (lambda r: setattr(r, "over", 3), bytes, "scalars must have k, 5, values over basis, got 3"),
    (lambda r: setattr(r, "dtype", 0), bytes, "dtype of update.payload.scalars must be one of fp32, .* number 0"),
    (lambda r: setattr(r, "k", 2**63), bytes, "scalars.k must be an integer in 1..1048576, got 9223372036854775808"),
    (lambda r: setattr(r, "k", 0), bytes, "scalars.k must be an integer in 1..1048576, got 0"),
    (lambda r: setattr(r, "k", 4), bytes, "shapes of update.payload need 13 bytes, its tensor data has 14"),
    (lambda r: setattr(r, "count", 2**63), bytes, "scalars must have 1..4194304 values over pool, got 92233720368"),
    (lambda r: setattr(r, "equal", True), bytes, "shapes of update.payload need 6 bytes, its tensor data has 14"),
    (forge(equal=True, count=1), bytes, "equal values of .* must be 2 or more over a pool of 2 or more, got 1 over"),
    (
        forge(equal=True, k=1),
        bytes,
        "equal values of .* must be 2 or more over a pool of 2 or more, got 3 over pool of 1",
    ),
    (
        forge(equal=True, over=2),
        bytes,
        "equal values of .* must be 2 or more over a pool of 2 or more, got 3 over steps",
    ),
    (lambda r: setattr(r, "count", 0), bytes, "scalars must have 1..4194304 values over pool, got 0"),
    (lambda r: setattr(r, "count", 4), bytes, "shapes of update.payload need 18 bytes, its tensor data has 14"),
    (nothing, lambda d: d[:-1], "shapes of update.payload need 14 bytes, its tensor data has 13"),
    (nothing, lambda d: d + b"\0", "shapes of update.payload need 14 bytes, its tensor data has 15"),
    (nothing, lambda d: d[:-1] + b"\2", "what follows 9 bits in their last byte must be zero, got 0x02"),
    (nothing, lambda d: d[:12] + b"\x05\0", "indices of update.payload.scalars must be in 0..4, got 5"),
    (nothing, lambda d: b"\0\0\xc0\x7f" + d[4:], r"update.payload.scalars must be finite, got nan at \[0\]"),
]


@pytest.mark.parametrize(("change", "data", "match"), SCALARS, ids=[match[:60] for _, _, match in SCALARS])
def test_forged_scalars_are_refused(change: Any, data: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decode(forged(update(), lambda record: change(record.payload.scalars), data), Update, limit=LIMIT)


COEFFICIENTS: list[tuple[Callable[[Any], Any], Callable[[bytes], bytes], str]] = [
    (lambda r: r.ClearField("subspace"), bytes, "coefficients must carry its subspace"),
    (lambda r: setattr(r.subspace, "k", 16), bytes, "must"),
    (lambda r: setattr(r.subspace, "k", 6), bytes, "a sketch must have a power of two of buckets, got 6"),
    (lambda r: setattr(r.subspace, "k", 2**40), bytes, "a subspace must have 1..1048576 directions"),
    (lambda r: setattr(r.subspace, "family", 9), bytes, "family of .*subspace must be one of gaussian, .* number 9"),
    (lambda r: setattr(r.subspace, "mask", b"ab"), bytes, "mask must be 64 lowercase hexadecimal digits or empty"),
    (lambda r: setattr(r, "exponent", -2000), bytes, "exponent must be an integer in -1074..1023, got -2000"),
    (lambda r: setattr(r, "exponent", 1022), bytes, r"coefficients must be finite, got 7 x 2\^1022"),
    (lambda r: setattr(r, "data_bytes", 2**63), bytes, "shapes of task.patch.payload need 9223372036854775808 bytes"),
    (nothing, lambda d: d[:-1], "shapes of task.patch.payload need"),
    (lambda r: setattr(r, "data_bytes", r.data_bytes - 1), lambda d: d[:-1], "must"),
    (lambda r: setattr(r, "data_bytes", r.data_bytes + 1), lambda d: d + b"\0", "must"),
    (lambda r: setattr(r, "data_bytes", 0), lambda d: b"", "steps must begin with a histogram of 1..106 tokens, got 0"),
]


@pytest.mark.parametrize(("change", "data", "match"), COEFFICIENTS, ids=[match[:60] for _, _, match in COEFFICIENTS])
def test_forged_coefficients_are_refused(change: Any, data: Any, match: str) -> None:
    frame = forged(task(coefficients()), lambda record: change(record.patch.payload.coefficients), data)
    with pytest.raises(ValueError, match=match):
        decode(frame, Task, limit=LIMIT)


@pytest.mark.parametrize(
    "change", [lambda r: setattr(r, "run", "abcd"), lambda r: (setattr(r, "run", "x"), setattr(r, "run_hex", b"1"))]
)
def test_text_has_one_way_to_travel(change: Any) -> None:
    with pytest.raises(ValueError, match=r"update.run must travel as bytes if it is hexadecimal and as text if not"):
        decode(forged(update(), change), Update, limit=LIMIT)


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_every_cut_and_every_damaged_byte_is_noticed(wire: str) -> None:
    frame = encode(task(coefficients(), start=Payload(scalars=POOL), subspace=LORA), wire=wire)
    for place in range(len(frame)):
        for altered in (
            frame[:place],
            *(frame[:place] + bytes([frame[place] ^ x]) + frame[place + 1 :] for x in (1, 128)),
        ):
            with pytest.raises(ValueError, match=r"must|speaks"):
                decode(altered, Task, limit=LIMIT)


def test_random_data_behind_right_checksums_never_crashes() -> None:
    rng = np.random.default_rng(0)
    decoded = 0
    for message, form in ((update(), Update), (task(coefficients()), Task)):
        for _ in range(1_000):
            noise = forged(message, nothing, lambda kept: rng.integers(0, 12, len(kept), np.uint8).tobytes())
            try:
                decode(noise, form, limit=LIMIT)
            except ValueError:
                continue
            decoded += 1
    assert 0 < decoded < 1_000
