"""HetLoRA: Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models (EMNLP 2024).

    B = sum_k w_k [s_k B_k, 0],   A = sum_k w_k [A_k; 0],   w_k = ||s_k B_k A_k||_F / sum_j ||s_j B_j A_j||_F

Factors are zero-padded to the largest rank and averaged; a device gets the leading r_k columns of B and rows of A
back, with B divided by its own scale, so that the product it sees is the truncated global product. Rows that only
low-rank devices could have filled are averaged with zeros, which is why the method collapses on strongly mixed ranks.

Legend: B [d_out, r_max], A [r_max, d_in] with scale 1; B_k [d_out, r_k], A_k [r_k, d_in]. The norm is over all modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedloom.protocols.messages import Array, DeviceReport, LowRank, ModelSpec, Patch, Payload, Task, Update
from fedloom.strategies import planning
from fedloom.strategies.base import State
from fedloom.strategies.given import first_state, next_state
from fedloom.strategies.intake import TensorSum, move_share, moved, taken
from fedloom.strategies.lowrank import fold, payload_norm
from fedloom.strategies.packing import spec_of, under
from fedloom.strategies.patchlog import read_log
from fedloom.strategies.server_optimizer import MergeOptions


@dataclass(frozen=True, kw_only=True)
class HetLoRA(MergeOptions):
    """HetLoRA: zero-padded means of A and B, weighted by the norm of each product."""

    rank: int = field(default=0, metadata={"doc": "The rank that factors are padded to; 0: the fleet's largest."})
    weights: Literal["norm", "examples"] = field(
        default="norm",
        metadata={"doc": "Weigh a device's factors by the norm of its product, or by its number of examples."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank must be >= 0, got {self.rank}")
        if self.weights not in ("norm", "examples"):
            raise ValueError(f"weights must be norm or examples, got {self.weights!r}")

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """B = 0 and a random A, at the option's rank or the largest of the fleet.

        Raises:
            ValueError: when neither is known, or a matrix is smaller than the rank.
        """
        return first_state(spec, seed, max(planning.fleet_ranks(self.rank, devices, "hetlora")), "hetlora")

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Every device goes on from the global factors, cut to its rank."""
        return planning.given_tasks(state, devices, round, self.scaling, lambda rank: self._given(state, rank))

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """The global factors, whole, on every device."""
        r_max = state.meta["rank"]
        start = self._given(state, r_max)
        return planning.given_evaluation(state, devices, round, self.scaling, r_max, start=start)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round: pad, weigh, average. Where no product has a norm, the factors stay as they are."""
        factors, heads, weight, examples = TensorSum(), TensorSum(), 0.0, 0.0
        for update in self._taken(state, updates):
            payload, n, share = update.payload, float(update.examples), 1.0
            if self.clip_norm:
                given = self._given(state, next(iter(payload.factors.values())).rank)
                share = move_share(given, payload, self.clip_norm)
                terms = {name: moved(given.factors[name], term, share) for name, term in payload.factors.items()}
                payload = Payload(factors=terms, dense=payload.dense)
            w = payload_norm(Payload(factors=payload.factors)) if self.weights == "norm" else n
            for name, term in payload.factors.items():
                factors.add(_padded(name, term, state.meta["rank"]), w)
            heads.add(payload.dense, n * share)
            weight, examples = weight + w, examples + n
        mean = factors.finish(weight) if weight else under("global", state.tensors)
        return next_state(state, self, mean, heads.finish(examples))

    def _taken(self, state: State, updates: Iterable[Update]) -> Iterable[Update]:
        r_max = state.meta["rank"]
        for update in taken(updates, spec_of(state)):
            ranks = {term.rank for term in update.payload.factors.values()}
            if len(ranks) != 1 or max(ranks) > r_max:
                raise ValueError(f"update of {update.device} must have one rank <= {r_max}, got {sorted(ranks)}")
            yield update

    def _given(self, state: State, rank: int) -> Payload:
        """The leading `rank` columns of B and rows of A, with the scale of that rank taken out of B."""
        terms = {}
        for name, a in under("global/a", state.tensors).items():
            b = state.tensors[f"global/b/{name}"]
            scale = planning.scaled_term(b[:, :rank], a[:rank], self.scaling).scale
            terms[name] = planning.scaled_term(b[:, :rank] / scale, np.ascontiguousarray(a[:rank]), self.scaling)
        return Payload(factors=terms)

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The head deltas that a device at version `since` lacks; the adapter itself travels in the task."""
        return planning.catch_up(state, since)

    def adapter(self, state: State) -> Payload:
        """The global factors, whole, and the heads."""
        return Payload(factors=self._given(state, state.meta["rank"]).factors, dense=read_log(state).total.dense)


def _padded(name: str, term: LowRank, rank: int) -> dict[str, Array]:
    """Factors with their scale in b, zero-padded to a rank."""
    folded, extra = fold(term), rank - term.rank
    return {
        f"b/{name}": np.pad(folded.b, ((0, 0), (0, extra))),
        f"a/{name}": np.pad(folded.a, ((0, extra), (0, 0))),
    }
