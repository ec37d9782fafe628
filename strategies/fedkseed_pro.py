"""FedKSeed-Pro: the seeds that mattered are drawn more often (Qin et al., ICML 2024, section 3.4).

    a_k = mean |rho| of seed k's visits so far,    p = softmax(minmax(a)),    k_t ~ p

A seed that nobody has visited has the mean amplitude of the others. As published, drawing with p tilts the expected
step towards the loud seeds, sum_k p_k g_k z_k in place of sum_k g_k z_k / K. With `correct` each step is weighted by
1 / (K p_k), which undoes that exactly (importance sampling), at the price of the variance it was meant to lower.

The server draws and lists the directions of each task: a dozen bits a step, where p would be K numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import (
    Array,
    DeviceReport,
    ModelSpec,
    Over,
    Patch,
    Payload,
    Scalars,
    Task,
    Update,
)
from fedloom.protocols.seeds import derive_seed
from fedloom.strategies import subspace
from fedloom.strategies.base import State


@dataclass(frozen=True, kw_only=True)
class FedKSeedPro(subspace.SubspaceOptions):
    """FedKSeed-Pro: seeds drawn by how much they mattered, as published or with importance correction."""

    family: str = field(default="rademacher", metadata={"doc": "The pool's directions: rademacher or gaussian."})
    correct: bool = field(
        default=False, metadata={"doc": "Weight each step by 1 / (K p), so that the expected step is the uniform one."}
    )
    draws: int = field(
        default=256, metadata={"doc": "Directions listed for a device: at least train.steps x train.directions."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        subspace.check_pool(self.family)
        if not 1 <= self.draws <= 2**20:
            raise ValueError(f"draws must be in 1..{2**20}, got {self.draws}")

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """The base, a pool from the seed, and no amplitudes."""
        state = subspace.first_state(self, spec, seed, devices, self.family)
        own: dict[str, Array] = {"amplitude": np.zeros(self.k), "visits": np.zeros(self.k)}
        return State(version=0, tensors={**state.tensors, **own}, meta=state.meta)

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Each device is told which directions to step along, and by what to weight each step."""
        p = probabilities(state.tensors["amplitude"], state.tensors["visits"])

        def listed(report: DeviceReport) -> Payload:
            seed = derive_seed(state.meta["seed"], "fedkseed_pro", round, report.device)
            indices = np.random.Generator(np.random.Philox(key=seed)).choice(self.k, self.draws, p=p)
            weights = self._weights(p)[indices].astype(np.float32)
            return Payload(scalars=Scalars(over=Over.POOL, k=self.k, values=weights, indices=indices.astype(np.int64)))

        return subspace.tasks(self, state, devices, round, tuner=lambda _: "zeroth_order", start=listed)

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """The newest version on every device."""
        return subspace.evaluation(self, state, devices, round)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round as in FedKSeed, and the amplitudes that it showed."""
        weights = self._weights(probabilities(state.tensors["amplitude"], state.tensors["visits"]))
        total, weight = np.zeros(self.k), 0.0
        amplitude, visits = state.tensors["amplitude"].copy(), state.tensors["visits"].copy()
        for update, scalars in subspace.taken(updates, state, self.scalar_limit):
            change = subspace.contribution(scalars, subspace.subspace_of(state))
            total += update.examples * subspace.clipped(change, self.clip_norm)
            weight += update.examples
            np.add.at(amplitude, scalars.drawn(), np.abs(scalars.values) / weights[scalars.drawn()])
            np.add.at(visits, scalars.drawn(), 1.0)
        return subspace.next_state(self, state, total / weight, {"amplitude": amplitude, "visits": visits})

    def _weights(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1.0 / (self.k * p) if self.correct else np.ones(self.k)

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The coefficients' change since a version."""
        return subspace.log_of(state).since(since)

    def adapter(self, state: State) -> Payload:
        """All coefficients."""
        return subspace.whole(state)


def probabilities(amplitude: Array, visits: Array) -> NDArray[np.float64]:
    """p = softmax(minmax(a)), [K], from sums of |rho| and numbers of visits; uniform before the first visit."""
    seen = visits > 0
    if not seen.any():
        return np.full(len(visits), 1.0 / len(visits))
    a = np.where(seen, amplitude / np.maximum(visits, 1), 0.0)
    a[~seen] = a[seen].mean()
    spread = a.max() - a.min()
    weights = np.exp((a - a.min()) / spread if spread > 0 else np.zeros_like(a))
    result: NDArray[np.float64] = weights / weights.sum()
    return result
