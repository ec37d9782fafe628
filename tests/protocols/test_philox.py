"""Philox against Random123's known-answer vectors (kat_vectors, `philox4x32 10`) and against Python's whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.protocols.philox import M0, M1, ROUNDS, W0, W1, philox4x32

KNOWN = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
words = st.integers(0, 2**32 - 1)


def array(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def whole_numbers(counter: list[int], key: list[int]) -> list[int]:
    """The paper's rounds, section 4.3, in integers without bounds."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        (h0, l0), (h1, l1) = divmod(M0 * x0, 2**32), divmod(M1 * x2, 2**32)
        x0, x1, x2, x3 = h1 ^ x1 ^ k0, l1, h0 ^ x3 ^ k1, l0
        k0, k1 = (k0 + W0) % 2**32, (k1 + W1) % 2**32
    return [x0, x1, x2, x3]


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    counter, key, answer = (array(text) for text in KNOWN[name])
    assert philox4x32(counter, key).tolist() == answer.tolist()
    assert whole_numbers(counter.tolist(), key.tolist()) == answer.tolist()


@given(st.lists(words, min_size=4, max_size=4), st.lists(words, min_size=2, max_size=2))
def test_equals_whole_numbers(counter: list[int], key: list[int]) -> None:
    made = philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert made.tolist() == whole_numbers(counter, key)


def test_counters_and_keys_broadcast() -> None:
    counters = np.arange(24, dtype=np.uint32).reshape(6, 4)
    keys = np.arange(6, dtype=np.uint32).reshape(3, 1, 2)
    made = philox4x32(counters, keys)
    assert made.shape == (3, 6, 4)
    assert made.dtype == np.uint32
    assert made[2, 5].tolist() == whole_numbers(counters[5].tolist(), keys[2, 0].tolist())


def test_blocks_of_neighbouring_counters_differ_in_about_half_their_bits() -> None:
    counters = np.zeros((1000, 4), np.uint32)
    counters[:, 0] = np.arange(1000)
    made = philox4x32(counters, np.zeros(2, np.uint32))
    flips = np.bitwise_count(made[1:] ^ made[:-1]).sum(axis=1)
    assert abs(flips.mean() - 64) < 4 * np.sqrt(32 / 999)
