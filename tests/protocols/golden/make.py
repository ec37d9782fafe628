"""Write the golden values of directions: python tests/protocols/golden/make.py

They are exact on every machine, and may change only with DIRECTIONS_VERSION. Of an array there are its first values and
16 hexadecimal digits of the SHA-256 of its little-endian bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.protocols import directions

GOLDEN = Path(__file__).parent / "directions.json"

KEYS = (0, 1, 2**64 - 1, 0x0123456789ABCDEF)
NAMES = ("", "model.embed_tokens.weight", "schlüssel/0")
# the begin, inside a block, far off, and across the 2^32nd block of signs
SPANS = ((0, 4096), (77, 1000), (10**12 + 1, 10**12 + 500), (2**39 - 300, 2**39 + 300))


def digest(array: np.ndarray[Any, Any]) -> str:
    """Of an array's bytes, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()).hexdigest()[:16]


def measure() -> dict[str, Any]:
    """The values of directions.py."""
    made: dict[str, Any] = {"version": directions.DIRECTIONS_VERSION, "directions": [], "sketches": [], "vectors": []}
    for family in ("gaussian", "rademacher"):
        for number, (key, (start, stop)) in enumerate(itertools.product(KEYS, SPANS)):
            name = NAMES[number % len(NAMES)]
            values = directions.direction(family, key, name, start, stop)
            entry = {"family": family, "key": key, "name": name, "start": start, "stop": stop}
            made["directions"].append(entry | {"first": [float(v) for v in values[:4]], "sha256": digest(values)})
    for k in (1, 16, 256, 65536):
        for start, stop in SPANS:
            buckets, signs = directions.sketch_rows(KEYS[3], NAMES[1], k, start, stop)
            entry = {"k": k, "seed": KEYS[3], "name": NAMES[1], "start": start, "stop": stop}
            made["sketches"].append(entry | {"first": buckets[:4].tolist(), "sha256": digest(signs * (buckets + 1))})
    made["pool_keys"] = [int(key) for key in directions.pool_keys(7, np.array([0, 1, 4095, 2**20 - 1]))]
    for step in (0, 1, 12345):
        vector = directions.sign_vector(7, step, 512)
        made["vectors"].append({"seed": 7, "step": step, "k": 512, "sha256": digest(vector)})
    return made


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(measure(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(GOLDEN)
