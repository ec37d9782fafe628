"""The steps of a subspace's coefficients as bytes, without loss, whatever the wire: sparse or dense, small or large.

    1 byte, then as many    histogram of the tokens (rans.py)
    ...                     the tokens of all steps
    the rest                signs of the steps that are not 0, then the bits that tokens leave open, lowest bits first

The token of a step s with |s| < 4 is |s|; a larger one's says how many bits |s| has, and the second highest of them.
The bits below those are next to random and travel as they are. 4096 steps, a tenth to all of them rounded normals of
any width and the others 0, take their entropy and 1%, the histogram and at most 12 bytes; zstd at its best, on bytes,
nibbles or a bitmap and the values it marks, stays 2 to 40% above the entropy.

Nothing is read that `pack_steps` would not have written: exactly one string of bytes stands for a vector of steps.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.bitpack import join_bits, split_bits
from fedloom.protocols.rans import histogram, rans_decode, rans_encode

Steps = NDArray[np.int64]

STEP_BITS: Final = 53
_SMALL_BITS: Final = 2  # steps of at most so many bits are tokens by themselves
_SMALL: Final = 1 << _SMALL_BITS
_TOKENS: Final = _SMALL + 2 * (STEP_BITS - _SMALL_BITS)


def pack_steps(steps: Steps) -> bytes:
    """The bytes of steps [K] below 2^53.

    Raises:
        ValueError: for a larger one.
    """
    size = np.abs(steps)
    bits = np.frexp(size.astype(np.float64))[1].astype(np.int64)  # exact below 2^53
    if steps.size and not 0 <= int(size.min()) <= int(size.max()) < 1 << STEP_BITS:  # |-2^63| is negative
        raise ValueError(f"steps must lie within +-(2^{STEP_BITS} - 1), got {steps.min()} to {steps.max()}")
    token = np.where(
        size < _SMALL, size, _SMALL + 2 * (bits - _SMALL_BITS - 1) + ((size >> np.maximum(bits - 2, 0)) & 1)
    )
    table = histogram(token)
    open_bits = _open_bits(token)
    rest = [(steps < 0)[size > 0].astype(np.uint8)]
    rest += [
        ((size[open_bits > place] >> place) & 1).astype(np.uint8) for place in range(int(open_bits.max(initial=0)))
    ]
    return bytes([len(table)]) + table + rans_encode(token, table) + join_bits(np.concatenate(rest))


def unpack_steps(data: memoryview | bytes, k: int) -> Steps:
    """The k steps that `data` stands for, int64 [k]. Memory: some 100 bytes a step, whatever `data` says.

    Raises:
        ValueError: for bytes that `pack_steps` cannot have made.
    """
    view = memoryview(data)
    length = view[0] if len(view) else 0
    table, coded = bytes(view[1 : 1 + length]), view[1 + length :]
    if not 1 <= length <= _TOKENS or len(table) != length:
        raise ValueError(f"steps must begin with a histogram of 1..{_TOKENS} tokens, got {length}")
    token, used = rans_decode(coded, table, k)
    if histogram(token) != table:
        raise ValueError("steps must come with the histogram of their own tokens")
    open_bits = _open_bits(token)
    size = np.where(token < _SMALL, token, (2 + ((token - _SMALL) & 1)) << open_bits)
    signed = size > 0
    start = int(signed.sum())
    rest = split_bits(coded[used:], start + int(open_bits.sum()))
    negative = np.zeros(k, np.bool_)
    negative[signed] = rest[:start] == 1
    for place in range(int(open_bits.max(initial=0))):
        having = open_bits > place
        stop = start + int(having.sum())
        size[having] |= rest[start:stop].astype(np.int64) << place
        start = stop
    return np.where(negative, -size, size)


def _open_bits(token: Steps) -> Steps:
    """How many bits of each step its token leaves open, beside the sign."""
    return np.where(token < _SMALL, 0, (token - _SMALL) // 2 + _SMALL_BITS - 1)
