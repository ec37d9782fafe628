"""The sketch: K numbers for all weights, from devices that backpropagate and devices that only run forward passes.

    theta_v = theta_0 + S c_v,    S a count sketch [d, K] (protocols/directions.py)
    delta       d_i = c_i - c_v after local steps                         c_{v+1} = c_v + step(sum_i p_i d_i)
    gradient    d_i = an estimate of -S' grad L_i(theta_v):               c_{v+1} = c_v + Adam(sum_i p_i d_i)
                S' grad over T batches, or -(1/T) sum_t g_t v_t forward-only: E[g v] = S' grad
    path        the same along local SGD steps: d_i = (c_i - c_v) / (lr T), normalised as in FedNova (Wang et al. 2020)

Either kind of device estimates the same K numbers, so they average. Local steps of both kinds do not: a forward-only
learning rate must be about K times smaller, so its deltas are short and are drowned in the others'. Gradient estimates
have the same expectation and length, and the optimiser, with its memory, is on the server.

Legend: c, d, v [K]; p_i = n_i / sum n; T local batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedloom.protocols.directions import check_k
from fedloom.protocols.messages import DeviceReport, ModelSpec, Over, Patch, Payload, Scalars, Task, Update
from fedloom.strategies import subspace
from fedloom.strategies.base import State


@dataclass(frozen=True, kw_only=True)
class Sketch(subspace.SubspaceOptions):
    """The sketch: K coefficients, forward-only and backpropagating devices in one fleet."""

    exchange: Literal["delta", "gradient", "path"] = field(
        default="delta",
        metadata={
            "doc": "What devices send: `delta`, where local steps led; `gradient`, an estimate at the round's point; "
            "`path`, the mean along local SGD steps. Fleets of both kinds need the latter two and fedadam."
        },
    )
    combine: Literal["examples", "variance"] = field(
        default="examples",
        metadata={
            "doc": "Weight devices by `examples`, or divide that by the relative `variance` 1 + K / T of a "
            "forward-only estimate, which quiets forward-only devices."
        },
    )
    precondition: Literal["all", "backprop"] = field(
        default="all",
        metadata={
            "doc": "Whose gradients fedadam's second moment is taken of: `all` devices', or those of `backprop` "
            "devices where a round has any, so that noise of the others does not shrink steps (nor hold them back)."
        },
    )
    leave_out_forward: bool = field(
        default=False, metadata={"doc": "Train on devices that can backpropagate alone; the others are only judged."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self.k, "sketch")
        if self.exchange not in ("delta", "gradient", "path"):
            raise ValueError(f"exchange must be delta, gradient or path, got {self.exchange!r}")
        if self.precondition not in ("all", "backprop"):
            raise ValueError(f"precondition must be all or backprop, got {self.precondition!r}")
        if self.combine not in ("examples", "variance"):
            raise ValueError(f"combine must be examples or variance, got {self.combine!r}")

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """The base, and a sketch from the seed."""
        return subspace.first_state(self, spec, seed, devices, "sketch")

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Each device does what it can: `subspace` with backpropagation, `zeroth_order` without."""
        knobs = {"exchange": self.exchange} if self.exchange != "delta" else {}
        able = [report for report in devices if not self.leave_out_forward or "backprop" in report.capabilities]
        return subspace.tasks(self, state, able, round, tuner=_tuner, knobs=knobs)

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """The newest version on every device."""
        return subspace.evaluation(self, state, devices, round)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round: the mean of the devices' changes or gradient estimates, and the server's step."""
        total, weight = np.zeros(self.k), 0.0
        clean, clean_weight = np.zeros(self.k), 0.0
        for update, scalars in subspace.taken(updates, state, self.scalar_limit):
            change = subspace.contribution(scalars, subspace.subspace_of(state))
            share = update.examples / (self._variance(scalars) if self.combine == "variance" else 1.0)
            moved = share * subspace.clipped(change, self.clip_norm)
            total += moved
            weight += share
            if scalars.over == Over.BASIS:
                clean += moved
                clean_weight += share
        measured = clean / clean_weight if clean_weight and self.precondition == "backprop" else None
        return subspace.next_state(self, state, total / weight, measured=measured)

    def _variance(self, scalars: Scalars) -> float:
        """1 + E|d - g|^2 / |g|^2: about 1 + K / T for a forward-only estimate from T directions, 1 for a gradient."""
        return 1 + self.k / len(scalars.values) if scalars.over == Over.STEPS else 1.0

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The coefficients' change since a version."""
        return subspace.log_of(state).since(since)

    def adapter(self, state: State) -> Payload:
        """All coefficients."""
        return subspace.whole(state)


def _tuner(report: DeviceReport) -> str:
    return "subspace" if "backprop" in report.capabilities else "zeroth_order"
