"""Philox4x32-10, a counter-based generator: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).

A block of four 32-bit words is a pure function of a 128-bit counter and a 64-bit key, in integer arithmetic: equal bit
for bit on every processor, in any order, for any part of a stream. Checked against Random123's known-answer vectors.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

M0: Final = 0xD2511F53
M1: Final = 0xCD9E8D57
W0: Final = 0x9E3779B9
W1: Final = 0xBB67AE85
ROUNDS: Final = 10

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: Words, key: Words) -> Words:
    """Blocks of random words, [..., 4], of counters [..., 4] under keys [..., 2], which broadcast."""
    x = np.asarray(counter, np.uint32).astype(np.uint64)
    k = np.asarray(key, np.uint32).astype(np.uint64)
    x0, x1, x2, x3 = (x[..., i] for i in range(4))
    k0, k1 = k[..., 0], k[..., 1]
    for _ in range(ROUNDS):
        p0, p1 = np.uint64(M0) * x0, np.uint64(M1) * x2
        x0, x1, x2, x3 = (p1 >> _HALF) ^ x1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ x3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(W0)) & _LOW, (k1 + np.uint64(W1)) & _LOW
    return np.stack(np.broadcast_arrays(x0, x1, x2, x3), axis=-1).astype(np.uint32)
