"""Fedloom's default: exact aggregation of any mix of ranks, a capped downlink, and nothing lost for good.

Stacking after FLoRA (Wang et al., NeurIPS 2024), the SVD of the stack through its small core after FLoRIST (2025),
error feedback after Seide et al. (2014) and Karimireddy et al. (2019).

    dW_t = sum_k p_k s_k B_k A_k                                     p_k = n_k / sum n
    M_t = dW_t + E_{t-1},    delta_t = best rank-r approximation of M_t,    E_t = M_t - delta_t
    W_t = W_{t-1} + delta_t on every device;  next: B = 0, A = the top right singular vectors of delta_t

Updates of pruned models, and of some modules only, are averaged over the devices that keep a row or column (masked.py).

Legend: B_k [d_out, r_k], A_k [r_k, d_in], s_k = alpha_k / r_k or alpha_k / sqrt(r_k); E the residual, in factors or
dense past the break-even rank; delta_t in factors b = U S [d_out, r], a = V^T [r, d_in].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedloom.protocols.messages import (
    Array,
    DeviceReport,
    LowRank,
    ModelSpec,
    Patch,
    Payload,
    Start,
    Task,
    Update,
)
from fedloom.strategies import planning
from fedloom.strategies.base import State
from fedloom.strategies.intake import product_sum
from fedloom.strategies.lowrank import Delta, bounded, plus, truncate
from fedloom.strategies.packing import pack_deltas, prefixed, spec_of, spec_to_meta, under, unpack_delta
from fedloom.strategies.patchlog import PatchLog, read_log
from fedloom.strategies.server_optimizer import MergeOptions, refuse_elementwise, step, step_product


@dataclass(frozen=True, kw_only=True)
class Fedloom(MergeOptions):
    """Exact stacking of mixed ranks, cut to a rank cap by SVD, with error feedback (the default)."""

    rank_cap: int = field(default=16, metadata={"doc": "Largest rank of a round's delta for each matrix."})
    energy: float = field(
        default=1.0, metadata={"doc": "Share of the energy to keep of a round's delta; the cap goes first."}
    )
    error_feedback: bool = field(
        default=True, metadata={"doc": "Keep what was cut on the server and add it to the next round."}
    )
    residual_rank: int = field(default=0, metadata={"doc": "Largest rank of what is kept back; 0: all of it, exactly."})
    partial: bool = field(
        default=False,
        metadata={
            "doc": "Take updates that leave out modules, and average each module over the devices that adapt it."
        },
    )
    start: Literal["patch", "fresh"] = field(
        default="patch",
        metadata={"doc": "Where A starts: `patch`, the newest delta's right singular vectors; `fresh`, random."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_elementwise(self, "fedloom")
        if self.rank_cap < 1 or self.residual_rank < 0:
            raise ValueError(
                f"rank_cap must be >= 1 and residual_rank >= 0, got {self.rank_cap} and {self.residual_rank}"
            )
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")
        if self.start not in ("patch", "fresh"):
            raise ValueError(f"start must be patch or fresh, got {self.start!r}")

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """An empty patch."""
        return State(version=0, meta={"spec": spec_to_meta(spec), "log": PatchLog(spec=spec).meta()})

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Each device trains at its own rank on base and patch, from B = 0."""
        start = Start.PATCH if self.start == "patch" else Start.FRESH
        return planning.merging_tasks(state, devices, round, self.scaling, start)

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Base and patch on every device."""
        return planning.patch_evaluation(state, devices, round, self.scaling)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round: sum, step, cut, keep back."""
        spec = spec_of(state)
        total = product_sum(updates, spec, self.clip_norm, partial=self.partial)
        kept: dict[str, LowRank] = {}
        tensors: dict[str, Array] = {}
        for name, change in total.matrices():
            moved, momentum = step_product(self, change, unpack_delta("momentum", name, state.tensors))
            delta, residual = self._cut(plus(moved, unpack_delta("residual", name, state.tensors)))
            if delta is not None:
                kept[name] = delta
            tensors |= pack_deltas("residual", {name: residual}) | pack_deltas("momentum", {name: momentum})
        heads, moments = step(self, total.heads(), under("heads", state.tensors))
        log = read_log(state).push(Payload(factors=kept, dense=heads))
        tensors |= prefixed("heads", moments) | log.tensors()
        return State(version=state.version + 1, tensors=tensors, meta={**state.meta, "log": log.meta()})

    def _cut(self, whole: Delta) -> tuple[LowRank | None, Delta]:
        """The delta to send, and the residual to keep."""
        kept, residual = truncate(bounded(whole), self.rank_cap, self.energy)
        if not self.error_feedback:
            return kept, Delta()
        if self.residual_rank:
            tail, _ = truncate(residual, self.residual_rank)
            return kept, Delta(factors=tail)
        return kept, residual

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The deltas that a device at version `since` lacks."""
        return planning.catch_up(state, since)

    def adapter(self, state: State) -> Payload:
        """The whole patch."""
        return read_log(state).total
