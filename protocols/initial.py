"""Starting values of an adapter's A, equal bit for bit on every machine, from a seed and the module's name.

Philox4x64 counters make the integers (`Philox.random_raw`, a documented stream); their top 24 bits become exact float32
values in [-1, 1), scaled to peft's own default, U(-1/sqrt(d_in), 1/sqrt(d_in)).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def initial_a(seed: int, name: str, rank: int, d_in: int) -> NDArray[np.float32]:
    """A random A, [rank, d_in]: the first rows do not depend on how many are asked for."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(rank * d_in)
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return unit.reshape(rank, d_in) * np.float32(d_in**-0.5)
