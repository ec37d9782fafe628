"""FFA-LoRA: Sun et al., Improving LoRA in Privacy-preserving Federated Learning (ICLR 2024).

    A = A_0 for all and for ever,    B = sum_k p_k B_k,    so that    s B A_0 = sum_k p_k s B_k A_0 exactly

A_0 = initial_a(seed, module, r, d_in) is made on both sides from `Task.shared_a_seed` and never travels: in either
direction a factor's a is [r, 0], an A without columns, and `fill_a` puts A_0 in its place. That halves the bytes both
ways.

Legend: B_k [d_out, r], A_0 [r, d_in], s = alpha / r or alpha / sqrt(r), p_k = n_k / sum n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import DeviceReport, LowRank, ModelSpec, Patch, Payload, Task, Update
from fedloom.strategies import planning
from fedloom.strategies.base import State
from fedloom.strategies.given import first_state, next_state
from fedloom.strategies.intake import TensorSum, check_equal, move_share, moved, taken
from fedloom.strategies.packing import spec_of, under
from fedloom.strategies.patchlog import read_log
from fedloom.strategies.server_optimizer import MergeOptions


def fill_a(payload: Payload, seed: int, spec: ModelSpec) -> Payload:
    """The payload with A_0 where its factors have an a of no columns."""
    terms = {}
    for name, term in payload.factors.items():
        a = initial_a(seed, name, term.rank, spec.matrices[name].d_in) if term.a.shape[1] == 0 else term.a
        terms[name] = LowRank(b=term.b, a=a, alpha=term.alpha, rslora=term.rslora)
    return Payload(factors=terms, dense=payload.dense)


def drop_a(payload: Payload) -> Payload:
    """The payload with every a as [r, 0], for a trip between two sides that both know A_0."""
    terms = {
        name: LowRank(b=term.b, a=np.zeros((term.rank, 0), term.b.dtype), alpha=term.alpha, rslora=term.rslora)
        for name, term in payload.factors.items()
    }
    return Payload(factors=terms, dense=payload.dense)


@dataclass(frozen=True, kw_only=True)
class FFA(MergeOptions):
    """FFA-LoRA: A frozen and shared by seed, so the mean of B is exact and half the bytes travel."""

    rank: int = field(default=0, metadata={"doc": "The rank that every device trains; 0: the smallest of the fleet's."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank must be >= 0, got {self.rank}")

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """B = 0, at the option's rank or the smallest of the fleet; A is in the seed.

        Raises:
            ValueError: when neither is known, or a matrix is smaller than the rank.
        """
        rank = min(planning.fleet_ranks(self.rank, devices, "ffa"))
        return first_state(spec, seed, rank, "ffa", with_a=False)

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Every device goes on from the global B.

        Raises:
            ValueError: for a device that cannot train the shared rank.
        """
        planning.check_reach(devices, state.meta["rank"])
        fields = {"train_a": False, "shared_a_seed": state.meta["seed"]}
        given = drop_a(self._given(state))
        return planning.given_tasks(state, devices, round, self.scaling, lambda _: given, **fields)

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """The global B on every device."""
        fields = {"start": drop_a(self._given(state)), "train_a": False, "shared_a_seed": state.meta["seed"]}
        return planning.given_evaluation(state, devices, round, self.scaling, state.meta["rank"], **fields)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round: the p_k-weighted means of B and of the heads' deltas.

        Raises:
            ValueError: also for an update that carries an A, or whose rank or alpha is not the shared one.
        """
        spec, given = spec_of(state), self._given(state)
        factors, heads, weight = TensorSum(), TensorSum(), 0.0
        for update in taken(updates, spec, shared_a=True):
            check_equal(update, given)
            payload, n = fill_a(update.payload, state.meta["seed"], spec), float(update.examples)
            share = move_share(given, payload, self.clip_norm)
            for name, term in payload.factors.items():
                factors.add({f"b/{name}": moved(given.factors[name], term, share).b}, n)
            heads.add(payload.dense, n * share)
            weight += n
        return next_state(state, self, factors.finish(weight), heads.finish(weight))

    def _given(self, state: State) -> Payload:
        """The global B beside A_0."""
        terms = {}
        for name, b in under("global/b", state.tensors).items():
            matrix = spec_of(state).matrices[name]
            a = initial_a(state.meta["seed"], name, b.shape[1], matrix.d_in)
            terms[name] = planning.scaled_term(b, a, self.scaling)
        return Payload(factors=terms)

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The head deltas that a device at version `since` lacks; B itself travels in the task."""
        return planning.catch_up(state, since)

    def adapter(self, state: State) -> Payload:
        """The global B with A_0, and the heads."""
        return Payload(factors=self._given(state).factors, dense=read_log(state).total.dense)
