"""How fast frames are made and read: python benchmarks/codec.py [--json]

50 MB of fp32 factors at the width of a 7B model, each wire dtype, medians; and what TaskEncoder saves when one patch
goes to many devices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fedloom.protocols.codec import TaskEncoder, decode, encode
from fedloom.protocols.messages import LowRank, Patch, Payload, Start, Task, Update

D, RANK, FACTORS, REPEATS = 4096, 12, 127, 7


def median_seconds(action: Callable[[], Any]) -> float:
    """The median time of an action."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def measure(wire: str, payload: Payload, megabytes: float) -> dict[str, Any]:
    """One row: frame size, MB/s of fp32 both ways, and milliseconds per task that shares its patch."""
    update = Update(device="d", round=1, examples=3, payload=payload)
    frame = encode(update, wire=wire)
    patch = Patch(base_hash="h", since=0, version=1, payload=payload)
    task = Task(device="d", round=1, rank=8, alpha=16.0, start_from=Start.FRESH, patch=patch)
    encoder = TaskEncoder(wire)
    encoder.encode(task)
    return {
        "wire": wire,
        "frame_mb": len(frame) / 1e6,
        "encode_mb_per_s": megabytes / median_seconds(lambda: encode(update, wire=wire)),
        "decode_mb_per_s": megabytes / median_seconds(lambda: decode(frame, Update, limit=2**30)),
        "task_ms": 1e3 * median_seconds(lambda: encode(task, wire=wire)),
        "further_task_ms": 1e3 * median_seconds(lambda: encoder.encode(task)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    draw = np.random.default_rng(0).standard_normal
    factors = {
        f"layers.{i}": LowRank(b=draw((D, RANK)).astype("f4"), a=draw((RANK, D)).astype("f4"), alpha=16.0)
        for i in range(FACTORS)
    }
    megabytes = FACTORS * 2 * D * RANK * 4 / 1e6
    rows = [measure(wire, Payload(factors=factors), megabytes) for wire in ("fp32", "fp16", "bf16", "int8")]
    if asked.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{megabytes:.1f} MB of fp32 in {FACTORS} factors")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
