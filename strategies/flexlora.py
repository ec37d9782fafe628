"""FlexLoRA: Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources
(NeurIPS 2024).

    dW = sum_k p_k s_k B_k A_k = U S V^T;    device k goes on from  B_k = U_r sqrt(S_r) / s_k,  A_k = sqrt(S_r) V_r^T

with r = r_k. The state is the top-r_max part of dW, and the next dW is made from what truncated copies of it became:
energy beyond a device's rank is lost each round, which is where ranks collapse. The SVD goes through the stack's
small core. Where dW has fewer directions than r_k, A is filled up with random rows and B with zeros, or those would
never train again.

Legend: B_k [d_out, r_k], A_k [r_k, d_in], U [d_out, r], S [r], V [d_in, r]; state b = U S, a = V^T.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import (
    Array,
    DeviceReport,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Patch,
    Payload,
    Task,
    Update,
)
from fedloom.strategies import planning
from fedloom.strategies.base import State
from fedloom.strategies.intake import ProductSum, clip_share, taken
from fedloom.strategies.lowrank import Delta, plus, stack, truncate
from fedloom.strategies.packing import pack_deltas, prefixed, spec_of, spec_to_meta, under, unpack_delta
from fedloom.strategies.patchlog import PatchLog, read_log
from fedloom.strategies.server_optimizer import MergeOptions, refuse_elementwise, step, step_product


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(MergeOptions):
    """FlexLoRA: the SVD of the exact mean product, cut to each device's rank."""

    rank: int = field(default=0, metadata={"doc": "The rank that the server keeps; 0: the largest of the fleet's."})

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_elementwise(self, "flexlora")
        if self.rank < 0:
            raise ValueError(f"rank must be >= 0, got {self.rank}")

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """A zero product.

        Raises:
            ValueError: when neither the option rank nor the fleet is given, or a matrix is smaller than the rank.
        """
        rank = max(planning.fleet_ranks(self.rank, devices, "flexlora"))
        planning.check_rank("flexlora", rank, spec)
        meta = {"spec": spec_to_meta(spec), "rank": rank, "seed": seed, "log": PatchLog(spec=spec).meta()}
        return State(version=0, meta=meta)

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Every device goes on from the global product, cut to its rank."""
        return planning.given_tasks(state, devices, round, self.scaling, lambda rank: self._given(state, rank))

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """The global product, whole, on every device."""
        r_max = state.meta["rank"]
        start = self._given(state, r_max)
        return planning.given_evaluation(state, devices, round, self.scaling, r_max, start=start)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round: the exact mean product, the server's step, and its top r_max."""
        total = self._sum(state, updates)
        tensors: dict[str, Array] = {}
        for name, new in total.matrices():
            old = unpack_delta("global", name, state.tensors)
            momentum = Delta()
            if self.server_optimizer != "none":
                held = unpack_delta("momentum", name, state.tensors)
                moved, momentum = step_product(self, plus(new, old.times(-1.0)), held)
                new = plus(moved, old)
            kept, _ = truncate(new, state.meta["rank"])
            tensors |= pack_deltas("global", {name: Delta(factors=kept)}) | pack_deltas("momentum", {name: momentum})
        heads, moments = step(self, total.heads(), under("heads", state.tensors))
        log = read_log(state).push(Payload(dense=heads))
        tensors |= prefixed("heads", moments) | log.tensors()
        return State(version=state.version + 1, tensors=tensors, meta={**state.meta, "log": log.meta()})

    def _sum(self, state: State, updates: Iterable[Update]) -> ProductSum:
        """sum_k p_k s_k B_k A_k, each product's change from what its device was given kept within clip_norm."""
        spec = spec_of(state)
        total = ProductSum(spec)
        for update in taken(updates, spec):
            n, payload = float(update.examples), update.payload
            if not self.clip_norm:
                total.add(payload, n)
                continue
            old = {name: self._start(state, name, spec.matrices[name], t.rank) for name, t in payload.factors.items()}
            change = {name: stack([term, _negative(old[name])]) for name, term in payload.factors.items()}
            share = clip_share(Payload(factors=change, dense=payload.dense), self.clip_norm)
            total.add(payload, n, share)
            for name, term in old.items():
                if share < 1.0:
                    total.add_term(name, term, n * (1.0 - share))
        return total

    def _given(self, state: State, rank: int) -> Payload:
        matrices = spec_of(state).matrices
        return Payload(factors={name: self._start(state, name, matrix, rank) for name, matrix in matrices.items()})

    def _start(self, state: State, name: str, matrix: MatrixSpec, rank: int) -> LowRank:
        """The global product's top `rank` directions as balanced factors, filled up with B = 0 and a random A."""
        b = np.zeros((matrix.d_out, rank), np.float32)
        a = initial_a(state.meta["seed"], name, rank, matrix.d_in)
        term = unpack_delta("global", name, state.tensors).factors
        if term is not None:
            r = min(rank, term.rank)
            root = np.sqrt(np.linalg.norm(term.b[:, :r], axis=0))
            b, a = b.astype(term.b.dtype), a.astype(term.a.dtype)
            b[:, :r], a[:r] = term.b[:, :r] / root, term.a[:r] * root[:, None]
        scale = planning.scaled_term(b, a, self.scaling).scale
        return planning.scaled_term(b / scale, a, self.scaling)

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The head deltas that a device at version `since` lacks; the adapter itself travels in the task."""
        return planning.catch_up(state, since)

    def adapter(self, state: State) -> Payload:
        """The global product at r_max, and the heads."""
        return Payload(factors=self._given(state, state.meta["rank"]).factors, dense=read_log(state).total.dense)


def _negative(term: LowRank) -> LowRank:
    return LowRank(b=-term.b, a=term.a, alpha=term.alpha, rslora=term.rslora)
