"""FLoRA: Wang et al., Federated Fine-Tuning LLMs with Heterogeneous Low-Rank Adaptations (NeurIPS 2024).

    B = [B_1 ... B_K],  A = [p_1 s_1 A_1; ...; p_K s_K A_K],  so that  B A = sum_k p_k s_k B_k A_k = dW exactly

Every device merges the stack into its base and starts the next round from a fresh adapter. The published code fixes
the rank of the stack to r times the number of clients and is right for one alpha only; here rank and scale come with
each factor.

Updates of pruned models, and of some modules only, are scattered to full size and stacked alike (masked.py).

Legend: B_k [d_out, r_k], A_k [r_k, d_in], s_k = alpha_k / r_k or alpha_k / sqrt(r_k), p_k = n_k / sum n. The downlink
is the stack, of rank sum r_k; past the break-even rank the dense matrix is smaller and goes in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedloom.protocols.messages import Array, DeviceReport, ModelSpec, Patch, Payload, Start, Task, Update
from fedloom.strategies import planning
from fedloom.strategies.base import State
from fedloom.strategies.intake import product_sum
from fedloom.strategies.lowrank import Delta, payload_of
from fedloom.strategies.packing import pack_deltas, prefixed, spec_of, spec_to_meta, under, unpack_delta
from fedloom.strategies.patchlog import PatchLog, read_log
from fedloom.strategies.server_optimizer import MergeOptions, refuse_elementwise, step, step_product


@dataclass(frozen=True, kw_only=True)
class Flora(MergeOptions):
    """FLoRA: the exact stack of every client's factors goes to every device."""

    partial: bool = field(
        default=False,
        metadata={
            "doc": "Take updates that leave out modules, and average each module over the devices that adapt it."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_elementwise(self, "flora")

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """An empty patch."""
        return State(version=0, meta={"spec": spec_to_meta(spec), "log": PatchLog(spec=spec).meta()})

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Each device trains a fresh adapter at its own rank on base and patch."""
        return planning.merging_tasks(state, devices, round, self.scaling, Start.FRESH)

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Base and patch on every device."""
        return planning.patch_evaluation(state, devices, round, self.scaling)

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """One round: stack what came."""
        total = product_sum(updates, spec_of(state), self.clip_norm, partial=self.partial)
        deltas: dict[str, Delta] = {}
        tensors: dict[str, Array] = {}
        for name, change in total.matrices():
            deltas[name], momentum = step_product(self, change, unpack_delta("momentum", name, state.tensors))
            tensors |= pack_deltas("momentum", {name: momentum})
        heads, moments = step(self, total.heads(), under("heads", state.tensors))
        log = read_log(state).push(payload_of(deltas, heads))
        tensors |= prefixed("heads", moments) | log.tensors()
        return State(version=state.version + 1, tensors=tensors, meta={**state.meta, "log": log.meta()})

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The stacks that a device at version `since` lacks."""
        return planning.catch_up(state, since)

    def adapter(self, state: State) -> Payload:
        """The whole patch."""
        return read_log(state).total
