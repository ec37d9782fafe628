"""What an arm of bandit.py earned, and how much a run of arms lost against the best of them.

FedSpine's reward (Efficient Deployment of LLMs on Resource-constrained Devices) is made of local loss improvement,
pruning progress, and completion time against the other devices; this form of it is ours, bounded in [0, 1]:

    r = clip(loss drop / scale, 0, 1) x (1 + rho progress) / (1 + rho) / (1 + |T - median T| / median T)

Legend: T rounds, A arms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Reward:
    """The reward of a round in [0, 1]; each term can be left out, which makes it 1.

    clip(loss drop / scale, 0, 1) x (1 + rho progress) / (1 + rho) / (1 + |seconds - median| / median)
    """

    scale: float = 1.0  # the drop that earns everything, in the loss's unit
    rho: float = 1.0
    loss: bool = True
    progress: bool = True
    time: bool = True

    def __post_init__(self) -> None:
        if not self.scale > 0 or not self.rho >= 0:
            raise ValueError(f"scale must be > 0 and rho >= 0, got {self.scale} and {self.rho}")

    def __call__(self, loss_drop: float, progress: float, seconds: float, median_seconds: float) -> float:
        """The reward of a loss drop, a pruning progress in [0, 1], and seconds against the cohort's median.

        A loss that rose, or is not finite, earns 0. Being faster than the median costs as much as being slower.

        Raises:
            ValueError: for a progress outside [0, 1] or seconds that are not positive.
        """
        if not 0 <= progress <= 1 or not seconds > 0 or not median_seconds > 0:
            raise ValueError(
                f"progress must be in [0, 1] and seconds > 0, got {progress}, {seconds} and {median_seconds}"
            )
        drop = loss_drop / self.scale if math.isfinite(loss_drop) else 0.0
        gain = min(max(drop, 0.0), 1.0) if self.loss else 1.0
        pruned = (1 + self.rho * progress) / (1 + self.rho) if self.progress else 1.0
        late = 1 + abs(seconds - median_seconds) / median_seconds if self.time else 1.0
        return gain * pruned / late


def best_fixed(means: Floats) -> int:
    """Which of A arms was the best in hindsight, from expected rewards [T, A]; -inf where an arm did not fit."""
    return int(means.sum(0).argmax())


def regret(means: Floats, earned: Floats) -> Floats:
    """Cumulative regret [T] of expected rewards `earned` [T] against the best fixed arm in hindsight of `means` [T, A].

    Raises:
        ValueError: when the shapes disagree or no arm fitted in all rounds.
    """
    if means.ndim != 2 or earned.shape != means.shape[:1]:
        raise ValueError(f"means must be [T, A] and earned [T], got {means.shape} and {earned.shape}")
    best = means[:, best_fixed(means)]
    if not np.isfinite(best).all():
        raise ValueError("an arm must fit in every round, got none that does")
    return np.cumsum(best - earned)
