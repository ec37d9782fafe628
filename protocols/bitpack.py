"""Whole numbers packed into bits: `width` bits each, lowest bit first, without gaps, zeros at the very end."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint8]

_BLOCK: Final = 1 << 16  # numbers worked on at a time, a multiple of 8, so that a block ends with a byte


def index_bits(k: int) -> int:
    """ceil(log2 k), the bits that an index in 0..k - 1 takes; none where there is but one."""
    return (k - 1).bit_length()


def packed_bytes(count: int, width: int) -> int:
    """How many bytes `count` numbers take."""
    return (count * width + 7) // 8


def join_bits(bits: NDArray[Any]) -> bytes:
    """The bytes of a vector of bits, 0 or 1."""
    return np.packbits(bits, bitorder="little").tobytes()


def split_bits(data: memoryview | bytes, count: int) -> Bits:
    """The `count` bits that `data` holds, uint8 [count].

    Raises:
        ValueError: unless `data` has exactly their bytes, and zeros beyond them.
    """
    if len(data) != packed_bytes(count, 1):
        raise ValueError(f"{count} bits must have {packed_bytes(count, 1)} bytes, got {len(data)}")
    if count % 8 and data[-1] >> count % 8:
        raise ValueError(f"what follows {count} bits in their last byte must be zero, got {data[-1]:#04x}")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little")


def pack_bits(numbers: NDArray[np.integer[Any]], width: int) -> bytes:
    """The bytes of numbers [n].

    Raises:
        ValueError: unless each is in 0..2^width - 1.
    """
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < 1 << width:
        raise ValueError(f"numbers must be in 0..{(1 << width) - 1}, got {numbers.min()} to {numbers.max()}")
    places = np.arange(width, dtype=np.int64)
    blocks = (numbers[start : start + _BLOCK].astype(np.int64) for start in range(0, numbers.size, _BLOCK))
    return b"".join(join_bits(((block[:, None] >> places) & 1).astype(np.uint8).reshape(-1)) for block in blocks)


def unpack_bits(data: memoryview | bytes, count: int, width: int) -> NDArray[np.int64]:
    """The `count` numbers that `data` holds, int64 [count].

    Raises:
        ValueError: unless `data` has exactly their bytes, and zeros beyond them.
    """
    if len(data) != packed_bytes(count, width):
        raise ValueError(
            f"{count} numbers of {width} bits must have {packed_bytes(count, width)} bytes, got {len(data)}"
        )
    weights = np.int64(1) << np.arange(width, dtype=np.int64)
    numbers = np.zeros(count, np.int64)
    for start in range(0, count if width else 0, _BLOCK):
        size = min(_BLOCK, count - start)
        first = start * width // 8
        bits = split_bits(data[first : first + packed_bytes(size, width)], size * width)
        numbers[start : start + size] = bits.reshape(size, width) @ weights
    return numbers
