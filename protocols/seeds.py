"""Seeds for everything that is drawn: derived by hash from names, so that no draw depends on the order of others."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, for example `derive_seed(seed, "cohort", round)`."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_indices(seed: int, k: int, count: int) -> NDArray[np.int64]:
    """`count` draws from 0..k - 1 with replacement, the first ones whatever `count` is; k a power of two or not.

    Philox4x64's raw words, reduced by a product's upper half: bias below k / 2^32.
    """
    raw = np.random.Philox(key=seed).random_raw(count) >> np.uint64(32)
    return ((raw * np.uint64(k)) >> np.uint64(32)).astype(np.int64)
