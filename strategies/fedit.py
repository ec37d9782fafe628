"""FedIT: Zhang et al., Towards Building the Federated GPT: Federated Instruction Tuning (ICASSP 2024).

    A = sum_k p_k A_k,    B = sum_k p_k B_k,    so that    s B A = s sum_j sum_k p_j p_k B_j A_k

That is not sum_k p_k s B_k A_k: the terms with j != k are cross terms of unrelated clients. It needs one rank and one
alpha.

Legend: B_k [d_out, r], A_k [r, d_in], s = alpha / r or alpha / sqrt(r), p_k = n_k / sum n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedloom.protocols.messages import Array, DeviceReport, ModelSpec, Patch, Payload, Task, Update
from fedloom.strategies import planning
from fedloom.strategies.base import State
from fedloom.strategies.given import first_state, next_state
from fedloom.strategies.intake import TensorSum, check_equal, move_share, moved, taken
from fedloom.strategies.packing import spec_of, under
from fedloom.strategies.patchlog import read_log
from fedloom.strategies.server_optimizer import MergeOptions


@dataclass(frozen=True, kw_only=True)
class FedIT(MergeOptions):
    """FedIT: the mean of A and the mean of B, at one rank for all."""

    rank: int = field(default=0, metadata={"doc": "The rank that every device trains; 0: the smallest of the fleet's."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank must be >= 0, got {self.rank}")

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """B = 0 and a random A, at the option's rank or the smallest of the fleet.

        Raises:
            ValueError: when neither is known, or a matrix is smaller than the rank.
        """
        return first_state(spec, seed, min(planning.fleet_ranks(self.rank, devices, "fedit")), "fedit")

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Every device goes on from the global factors.

        Raises:
            ValueError: for a device that cannot train the shared rank.
        """
        planning.check_reach(devices, state.meta["rank"])
        return planning.given_tasks(state, devices, round, self.scaling, lambda _: self._given(state))

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """The global factors on every device."""
        rank, given = state.meta["rank"], self._given(state)
        return planning.given_evaluation(state, devices, round, self.scaling, rank, start=given)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round: the p_k-weighted means of A, of B and of the heads' deltas.

        Raises:
            ValueError: also for an update whose rank or alpha is not the shared one.
        """
        given = self._given(state)
        factors, heads, weight = TensorSum(), TensorSum(), 0.0
        for update in taken(updates, spec_of(state)):
            check_equal(update, given)
            share, n = move_share(given, update.payload, self.clip_norm), float(update.examples)
            for name, term in update.payload.factors.items():
                new = moved(given.factors[name], term, share)
                factors.add({f"b/{name}": new.b, f"a/{name}": new.a}, n)
            heads.add(update.payload.dense, n * share)
            weight += n
        return next_state(state, self, factors.finish(weight), heads.finish(weight))

    def _given(self, state: State) -> Payload:
        b, a = under("global/b", state.tensors), under("global/a", state.tensors)
        return Payload(factors={name: planning.scaled_term(b[name], a[name], self.scaling) for name in a})

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The head deltas that a device at version `since` lacks; the adapter itself travels in the task."""
        return planning.catch_up(state, since)

    def adapter(self, state: State) -> Payload:
        """The global factors and the heads."""
        heads: dict[str, Array] = dict(read_log(state).total.dense)
        return Payload(factors=self._given(state).factors, dense=heads)
