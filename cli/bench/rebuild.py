"""`fedloom bench rebuild`: time to rebuild a model from its coefficients, beside one pass over its memory.

    rebuild      theta = theta_0 + sum_k c_k z_k, or theta_0 + S c, in place, as a device does on arrival
    floor        theta += c for one number c: what reading and writing the weights costs
    reference    FedKSeed's way (Qin et al. 2024): for each seed, reseed torch's generator, draw a normal for every
                 weight, add it; timed for a few seeds, times K

The first two are interleaved, medians; the same number of threads for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from fedloom.protocols.directions import pool_keys
from fedloom.protocols.kernels import add_directions, add_sketch

REFERENCE_SEEDS = 3
SETTLE = 0.05  # seconds: torch's threads spin for a while after an operation, on the cores that others then lack
FLOORS = 5  # passes of the floor for each rebuild: it is short, so noise weighs on it


def rebuild(*, params: int, k: int, threads: int, family: str, repeats: int = 5) -> dict[str, Any]:
    """Measure one rebuild of `params` float32 weights from k coefficients.

    Returns:
        Seconds of each side (medians), "ratio_to_floor" = seconds / floor_seconds, "speedup" = reference_seconds /
        seconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        theta = torch.zeros(params)
        seconds, floor_seconds = _interleaved(_rebuilder(theta, k, threads, family), lambda: theta.add_(1e-6), repeats)
        per_seed = statistics.median(_seconds(partial(_reseed_and_add, theta, seed)) for seed in range(REFERENCE_SEEDS))
    finally:
        torch.set_num_threads(before)
    return {
        "params": params,
        "k": k,
        "threads": threads,
        "family": family,
        "seconds": seconds,
        "floor_seconds": floor_seconds,
        "ratio_to_floor": seconds / floor_seconds,
        "reference_seconds_per_seed": per_seed,
        "reference_seconds": per_seed * k,
        "speedup": per_seed * k / seconds,
    }


def _rebuilder(theta: torch.Tensor, k: int, threads: int, family: str) -> Callable[[], object]:
    """One rebuild in place."""
    weights, generator = theta.numpy(), np.random.default_rng(0)
    c = (1e-3 * generator.standard_normal(k)).astype(np.float32)
    if family == "sketch":
        return lambda: add_sketch(weights, weights, name="bench", start=0, seed=1, c=c, threads=threads)
    keys = pool_keys(1, np.arange(k))
    return lambda: add_directions(
        weights, weights, name="bench", start=0, family=family, keys=keys, scales=c, threads=threads
    )


def _reseed_and_add(theta: torch.Tensor, seed: int) -> None:
    z = torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed))
    theta.add_(z, alpha=1e-6)


def _interleaved(measured: Callable[[], object], floor: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of both, after one call of each that is not counted: it compiles, or touches the memory."""
    taken: list[float] = []
    floors: list[float] = []
    for repeat in range(repeats + 1):
        time.sleep(SETTLE)
        ours, theirs = _seconds(measured), [_seconds(floor) for _ in range(FLOORS)]
        if repeat:
            taken.append(ours)
            floors += theirs
    return statistics.median(taken), statistics.median(floors)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
