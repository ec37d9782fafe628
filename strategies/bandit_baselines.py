"""What the bandit of (pruning ratio, rank) is measured against: an arm at random, and the same arm always."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from fedloom.strategies.bandit import (
    Arm,
    BanditState,
    Box,
    Evidence,
    Limits,
    corner,
    draw,
    fresh,
    record,
    refuse,
    uniforms,
)


@dataclass(frozen=True, kw_only=True)
class RandomArm:
    """The baseline that draws from all that fits, and learns only what runs out of memory."""

    box: Box = field(default_factory=Box)

    def init(self, device: str, seed: int) -> BanditState:
        """Nothing observed."""
        return fresh(device, seed, self.box.whole())

    def choose(self, state: BanditState, round: int, limits: Limits, fleet: Evidence | None = None) -> Arm:
        """A ratio evenly from those that fit, then a log rank evenly."""
        part = corner(state, limits, state.leaves[0])
        if part is None:
            raise refuse(state, limits, self.box)
        return draw(state, limits, part, uniforms(state, round))

    def observe(
        self, state: BanditState, round: int, arm: Arm, reward: float, *, out_of_memory: bool = False
    ) -> BanditState:
        """Keep the newest arm and the bound of memory."""
        return record(state, round, arm, reward, out_of_memory, 0.0)


@dataclass(frozen=True, kw_only=True)
class FixedArm:
    """The baseline of one arm, moved only as far as fitting needs; with the best arm in hindsight, the oracle."""

    ratio: float
    rank: int
    box: Box = field(default_factory=Box)
    backoff: float = 0.05  # share of the memory that ran out to stay below, where possible

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= self.box.max_ratio or not 1 <= self.rank <= self.box.max_rank:
            raise ValueError(f"ratio and rank must be in {self.box}, got {self.ratio} and {self.rank}")

    def init(self, device: str, seed: int) -> BanditState:
        """Nothing observed."""
        return fresh(device, seed, self.box.whole())

    def choose(self, state: BanditState, round: int, limits: Limits, fleet: Evidence | None = None) -> Arm:
        """The arm; where it does not fit, the lowest ratio above it that does, then the highest rank below it."""
        leaf = np.array([min(self.ratio, limits.ratio_ceiling), self.box.max_ratio, 1.0, self.rank, math.nan])
        safe = replace(limits, memory=min(limits.memory, state.memory_bound * (1 - self.backoff)))
        for allowed in (safe, limits):
            for first in (self.rank, 1):  # a higher ratio before a lower rank
                leaf[2] = min(first, limits.rank_ceiling)
                part = corner(state, allowed, leaf)
                if part is not None:
                    return draw(state, allowed, part, (0.0, 1.0 - 2.0**-53))
        raise refuse(state, limits, self.box)

    def observe(
        self, state: BanditState, round: int, arm: Arm, reward: float, *, out_of_memory: bool = False
    ) -> BanditState:
        """Keep the newest arm and the bound of memory."""
        return record(state, round, arm, reward, out_of_memory, 0.0)
