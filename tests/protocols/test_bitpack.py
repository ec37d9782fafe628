"""Packed bits against a whole number in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.protocols import bitpack
from fedloom.protocols.bitpack import index_bits, join_bits, pack_bits, packed_bytes, split_bits, unpack_bits


def reference(numbers: list[int], width: int) -> bytes:
    whole = sum(number << place * width for place, number in enumerate(numbers))
    return whole.to_bytes((len(numbers) * width + 7) // 8, "little")


@st.composite
def widths_and_numbers(draw: st.DrawFn) -> tuple[int, list[int]]:
    width = draw(st.integers(0, 24))
    return width, draw(st.lists(st.integers(0, 2**width - 1), max_size=70))


@settings(max_examples=200, deadline=None)
@given(case=widths_and_numbers(), block=st.sampled_from([8, 16, 1 << 16]))
def test_packing_is_what_plain_python_does(case: tuple[int, list[int]], block: int) -> None:
    width, numbers = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitpack, "_BLOCK", block)
        packed = pack_bits(np.array(numbers, np.int64), width)
        assert packed == reference(numbers, width)
        assert len(packed) == packed_bytes(len(numbers), width)
        unpacked = unpack_bits(packed, len(numbers), width)
    assert (unpacked.tolist(), unpacked.dtype) == (numbers, np.int64)


@pytest.mark.parametrize("k", [*range(1, 70), 4095, 4096, 4097, 2**20])
def test_an_index_takes_the_bits_of_a_logarithm(k: int) -> None:
    bits = index_bits(k)
    assert 2**bits >= k
    assert bits == 0 or 2 ** (bits - 1) < k


def test_200_indices_of_4096_take_300_bytes() -> None:
    assert len(pack_bits(np.arange(200), index_bits(4096))) == 300
    assert pack_bits(np.zeros(5, np.int64), index_bits(1)) == b""


@pytest.mark.parametrize(("numbers", "width"), [([8], 3), ([-1], 3), ([1], 0), ([2**63 - 1], 20)])
def test_numbers_that_need_more_bits_are_refused(numbers: list[int], width: int) -> None:
    with pytest.raises(ValueError, match=rf"numbers must be in 0..{2**width - 1}, got"):
        pack_bits(np.array(numbers), width)


def test_only_the_packed_bytes_are_read() -> None:
    packed = pack_bits(np.array([5, 1, 7]), 3)  # nine bits
    for bad in (packed[:-1], packed + b"\0", b""):
        with pytest.raises(ValueError, match=f"3 numbers of 3 bits must have 2 bytes, got {len(bad)}"):
            unpack_bits(bad, 3, 3)
    for bit in range(1, 8):
        with pytest.raises(ValueError, match="what follows 9 bits in their last byte must be zero, got 0x"):
            unpack_bits(bytes([packed[0], packed[1] | 1 << bit]), 3, 3)


@settings(max_examples=100, deadline=None)
@given(bits=st.lists(st.integers(0, 1), max_size=40))
def test_bits_survive(bits: list[int]) -> None:
    packed = join_bits(np.array(bits, np.uint8))
    assert packed == reference(bits, 1)
    assert split_bits(packed, len(bits)).tolist() == bits
    with pytest.raises(ValueError, match=f"{len(bits)} bits must have {len(packed)} bytes, got {len(packed) + 1}"):
        split_bits(packed + b"\0", len(bits))
