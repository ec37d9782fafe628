"""FedKSeed: Qin et al., Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under
18 Kilobytes (ICML 2024), Algorithm 1.

    device i, step t:  k ~ U{0..K-1},  g = (L(w + eps z_k) - L(w - eps z_k)) / (2 eps),  w -= lr g z_k
    server:            c[k] -= lr sum_i p_i sum_{t: k_t = k} g_{i,t},    w = w_0 + sum_k c[k] z_k

Sums over a seed's visits, never means of them. What is published sends g and needs one learning rate for ever; here the
product rho = -lr g travels. The directions are Philox's (protocols/directions.py), the same on every device.

Legend: z_k [d] one of K Gaussian or Rademacher directions; p_i = n_i / sum n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedloom.protocols.messages import DeviceReport, ModelSpec, Patch, Payload, Task, Update
from fedloom.strategies import subspace
from fedloom.strategies.base import State


@dataclass(frozen=True, kw_only=True)
class FedKSeed(subspace.SubspaceOptions):
    """FedKSeed: a pool of K seeds, per-seed sums of scalars, full-parameter tuning from forward passes."""

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
        """Each device draws directions of the pool from its task's seed."""
        return subspace.tasks(self, state, devices, round, tuner=lambda _: "zeroth_order")

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """The newest version on every device."""
        return subspace.evaluation(self, state, devices, round)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round: c[k] += sum_i p_i sum_t rho_{i,t}."""
        total, weight = np.zeros(self.k), 0.0
        for update, scalars in subspace.taken(updates, state, self.scalar_limit):
            change = subspace.contribution(scalars, subspace.subspace_of(state))
            total += update.examples * subspace.clipped(change, self.clip_norm)
            weight += update.examples
        return subspace.next_state(self, state, total / weight)

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The coefficients' change since a version."""
        return subspace.log_of(state).since(since)

    def adapter(self, state: State) -> Payload:
        """All coefficients."""
        return subspace.whole(state)
