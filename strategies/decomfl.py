"""DeComFL: Li et al., Achieving Dimension-Free Communication in Federated Learning via Zeroth-Order Optimization
(ICLR 2025), Algorithms 2 and 3.

    all devices share a round's directions z_1 ... z_T;  device i returns rho_{i,t} along them, moving as it goes
    c[k_t] += (1 / m) sum_i rho_{i,t},    t = 1 ... T

The mean of each step over the m devices of the round, whatever the size of their data. What is published replays the
log of all rounds for a late device; here directions come from a pool of K, so a late device asks for K numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedloom.protocols.messages import DeviceReport, ModelSpec, Patch, Payload, Task, Update
from fedloom.protocols.seeds import derive_seed, draw_indices
from fedloom.strategies import subspace
from fedloom.strategies.base import State


@dataclass(frozen=True, kw_only=True)
class DeComFL(subspace.SubspaceOptions):
    """DeComFL: one list of directions for all devices of a round, the mean of their scalars for each step."""

    family: Literal["gaussian", "rademacher"] = field(
        default="rademacher", metadata={"doc": "The pool's directions: random signs, or normals as published."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        subspace.check_pool(self.family)

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """The base, and a pool from the seed."""
        return subspace.first_state(self, spec, seed, devices, self.family)

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """All devices draw the same directions."""
        knobs = {"draw_seed": self._draw_seed(state)}
        return subspace.tasks(self, state, devices, round, tuner=lambda _: "zeroth_order", knobs=knobs)

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """The newest version on every device."""
        return subspace.evaluation(self, state, devices, round)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round: the mean over devices of each step's scalar.

        Raises:
            ValueError: also for an update along other directions than the round's.
        """
        total, count = np.zeros(self.k), 0
        for update, scalars in subspace.taken(updates, state, self.scalar_limit):
            shared = draw_indices(self._draw_seed(state), self.k, len(scalars.values))
            if not np.array_equal(scalars.drawn(), shared):
                raise ValueError(f"update of {update.device} must go along the round's shared directions, got others")
            change = subspace.contribution(scalars, subspace.subspace_of(state))
            total += subspace.clipped(change, self.clip_norm)
            count += 1
        return subspace.next_state(self, state, total / count)

    def _draw_seed(self, state: State) -> int:
        return derive_seed(state.meta["seed"], "decomfl", state.version)

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The coefficients' change since a version."""
        return subspace.log_of(state).since(since)

    def adapter(self, state: State) -> Payload:
        """All coefficients."""
        return subspace.whole(state)
