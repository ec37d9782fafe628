"""Steps of coefficients: without loss, close to their entropy, one string of bytes each, and nothing else is read."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.protocols.coefficients_wire import pack_steps, unpack_steps
from fedloom.protocols.rans import frequencies, histogram, rans_decode, rans_encode

TOP = 2**53 - 1
STEP = st.one_of(
    st.just(0),
    st.integers(-9, 9),
    st.integers(-TOP, TOP),
    st.builds(lambda bits, sign: sign * (2**bits - 1), st.integers(0, 53), st.sampled_from([-1, 1])),
)


def normals(k: int, sigma: float, share: float = 1.0, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(k) < share, np.rint(rng.normal(0, sigma, k)), 0).astype(np.int64)


def entropy_bytes(sigma: float, share: float, k: int) -> float:
    """Of k independent steps, each a rounded normal with a probability of `share` and 0 otherwise."""
    top = math.ceil(9 * sigma) + 1
    edges = np.arange(-top, top + 2) - 0.5
    below = np.array([0.5 * math.erfc(-edge / (sigma * math.sqrt(2))) for edge in edges])
    p = share * np.diff(below)
    p[top] += 1 - share
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum()) * k / 8


@settings(max_examples=300, deadline=None)
@given(steps=st.lists(STEP, min_size=1, max_size=60))
def test_any_steps_survive(steps: list[int]) -> None:
    sent = np.array(steps, np.int64)
    packed = pack_steps(sent)
    assert pack_steps(sent.copy()) == packed
    received = unpack_steps(packed, len(steps))
    assert (received.tolist(), received.dtype) == (steps, np.int64)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 8.0, 1e6, 2.0**48])
def test_many_steps_survive(sigma: float) -> None:
    sent = normals(50_000, sigma)
    np.testing.assert_array_equal(unpack_steps(pack_steps(sent), len(sent)), sent)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4, 1.0])
@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0, 8.0, 100.0, 1e4])
def test_bytes_stay_near_the_entropy(sigma: float, share: float) -> None:
    packed = [pack_steps(normals(4096, sigma, share, seed)) for seed in range(16)]
    mean = float(np.mean([len(one) - one[0] for one in packed]))  # beside the histogram, a byte for each token
    assert mean < 1.01 * entropy_bytes(sigma, share, 4096) + 12
    assert max(one[0] for one in packed) <= 4 + 2 * math.log2(6 * sigma)


def test_nothing_to_say_takes_six_bytes() -> None:
    """The histogram's length, its one entry, and a state of 4 bytes that never changes."""
    assert len(pack_steps(np.zeros(4096, np.int64))) == 6


def test_golden_bytes() -> None:
    """Whole numbers alone make them: these on any machine. A change to them is a change of the protocol."""
    golden = "1008050401000000000000000000000001028d82d14e4c9e8ad001"
    steps = np.array([0, 1, -1, 2, 0, 0, -3, 1, 0, 0, 2, 1, 0, 0, -2, 2, 0, 250, 1])
    assert pack_steps(steps).hex() == golden
    np.testing.assert_array_equal(unpack_steps(bytes.fromhex(golden), len(steps)), steps)


@pytest.mark.parametrize("step", [2**53, -(2**53), 2**62, 2**63 - 1, -(2**63)])
def test_steps_beyond_53_bits_are_not_packed(step: int) -> None:
    with pytest.raises(ValueError, match=r"steps must lie within \+-\(2\^53 - 1\), got"):
        pack_steps(np.array([0, step]))


@pytest.mark.parametrize("sigma", [0.0, 0.5, 3.0, 1e5])
def test_only_what_was_packed_is_read(sigma: float) -> None:
    """Every byte string stands for at most one vector of steps, and every vector for exactly one string."""
    steps = normals(31, sigma, seed=3)
    packed = pack_steps(steps)
    for wrong in (packed[:-1], packed + b"\0", b"\0" + packed, b""):
        with pytest.raises(ValueError, match="must"):
            unpack_steps(wrong, len(steps))
    for k in (15, 40):
        with pytest.raises(ValueError, match="must"):
            unpack_steps(packed, k)
    for place in range(len(packed)):
        for flip in range(1, 256):
            altered = packed[:place] + bytes([packed[place] ^ flip]) + packed[place + 1 :]
            try:
                other = unpack_steps(altered, len(steps))
            except ValueError:
                continue
            assert pack_steps(other) == altered


def test_random_bytes_never_crash() -> None:
    rng = np.random.default_rng(0)
    for length in rng.integers(0, 60, 10_000):
        noise = bytes(rng.integers(0, 30, int(length), np.uint8))
        try:
            steps = unpack_steps(noise, 5)
        except ValueError:
            continue
        assert pack_steps(steps) == noise


def test_a_bomb_takes_bounded_memory() -> None:
    """Seven bytes may stand for 2^18 zeros; what they cost does not grow with what they claim."""
    packed = pack_steps(np.zeros(2**18, np.int64))
    assert len(packed) == 7
    tracemalloc.start()
    try:
        assert not unpack_steps(packed, 2**18).any()
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**18
        tracemalloc.reset_peak()
        for bad in (b"\x6a" + b"\xff" * 200, b"\xff" * 5, b"\x01\xff" + bytes(60)):
            with pytest.raises(ValueError, match="must"):
                unpack_steps(bad, 2**20)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_frequencies_are_counts_within_a_sixteenth() -> None:
    counts = np.unique(np.geomspace(1, 2**20, 3000).astype(np.int64))
    kept = np.array(frequencies(bytes(histogram(np.array([0] * count))[0] for count in counts[:600])))
    assert (abs(kept - counts[:600]) <= counts[:600] / 16).all()
    assert frequencies(bytes(range(16))) == list(range(16))
    assert frequencies(bytes([16, 17, 24, 255])) == [16, 18, 32, 15 << 30]
    assert frequencies(histogram(np.zeros(2**20, np.int64))) == [2**20]


@settings(max_examples=200, deadline=None)
@given(symbols=st.lists(st.integers(0, 40), min_size=1, max_size=80), tail=st.binary(max_size=3))
def test_coded_symbols_say_where_they_end(symbols: list[int], tail: bytes) -> None:
    sent = np.array(symbols, np.int64)
    table = histogram(sent)
    coded = rans_encode(sent, table)
    got, used = rans_decode(memoryview(coded + tail), table, len(symbols))
    assert (got.tolist(), used) == (symbols, len(coded))


@pytest.mark.parametrize(
    ("data", "table", "match"),
    [
        (b"", b"", "must begin with a state in 0..-1, got 0"),
        (bytes(9), b"\0\0", "must begin with a state in 0..-1, got 0"),
        (b"", b"\1", r"must begin with a state in 256..65535, got 0"),
        (b"\2\0\0", b"\1\1", "must begin with a state in 512..131071, got 131072"),
        (b"\1\0\0", b"\1\1", "coded symbols must be 99, got bytes for 7"),
        (b"\0\x02\x01" + bytes(99), b"\1\1", "coded symbols must end at the state 512, got"),
    ],
)
def test_coded_symbols_must_be_whole(data: bytes, table: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rans_decode(memoryview(data), table, 99)
