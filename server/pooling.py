"""Pooling what devices measured: sums over all held-out examples, and an interval that respects devices.

Devices report sums and counts (`exact_match_sum`, `n`), so a pooled value is what one evaluation over everybody's
held-out examples would give, without anybody's examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedloom.protocols.seeds import derive_seed

DRAWS = 2000


def pool(per_device: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Pooled means: `x_sum / n` for every `x_sum`, and `loss_sum / tokens` for the loss."""
    total: dict[str, float] = {}
    for metrics in per_device:
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + value
    return _means(total)


def interval(per_device: Sequence[Mapping[str, float]], metric: str, *, seed: int, share: float = 0.95) -> list[float]:
    """Percentile bootstrap over devices of a pooled metric: devices are redrawn whole, since their examples are alike.

    Returns:
        [low, high]; [value, value] for a single device.
    """
    if not per_device:
        return [0.0, 0.0]
    tables = [_means(dict(metrics)) for metrics in per_device]
    counted = "tokens" if metric in ("loss", "token_accuracy") else "n"
    weights = np.array([metrics[counted] for metrics in per_device])
    values = np.array([table[metric] for table in tables])
    generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "bootstrap", metric)))
    draws = generator.integers(0, len(values), size=(DRAWS, len(values)))
    pooled = (values[draws] * weights[draws]).sum(axis=1) / np.maximum(weights[draws].sum(axis=1), 1e-12)
    tail = (1 - share) / 2
    return [float(np.quantile(pooled, tail)), float(np.quantile(pooled, 1 - tail))]


def _means(total: Mapping[str, float]) -> dict[str, float]:
    means: dict[str, float] = {}
    for name, value in total.items():
        if name.endswith("_sum"):
            count = total.get("tokens" if name == "loss_sum" else "n", 0.0)
            means[name.removesuffix("_sum")] = value / count if count else 0.0
    if total.get("tokens"):
        means["token_accuracy"] = total.get("token_hits", 0.0) / total["tokens"]
    return means
