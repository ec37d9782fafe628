"""Strategies whose state is one global adapter, averaged entry by entry: FedIT, FFA-LoRA and HetLoRA.

State tensors: `global/b/<module>` and `global/a/<module>`, moments under `moments/`, the heads' deltas in the patch
log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import Array, ModelSpec, Payload
from fedloom.strategies.base import State
from fedloom.strategies.packing import prefixed, spec_of, spec_to_meta, under
from fedloom.strategies.patchlog import PatchLog, read_log
from fedloom.strategies.planning import check_rank
from fedloom.strategies.server_optimizer import MergeOptions, step, step_toward


def first_state(spec: ModelSpec, seed: int, rank: int, name: str, *, with_a: bool = True) -> State:
    """B = 0 and, where A is trained, A random from the seed.

    Raises:
        ValueError: when a matrix is smaller than the rank.
    """
    check_rank(name, rank, spec)
    tensors: dict[str, Array] = {}
    for module, matrix in spec.matrices.items():
        tensors[f"global/b/{module}"] = np.zeros((matrix.d_out, rank), np.float32)
        if with_a:
            tensors[f"global/a/{module}"] = initial_a(seed, module, rank, matrix.d_in)
    meta: dict[str, Any] = {"spec": spec_to_meta(spec), "rank": rank, "seed": seed, "log": PatchLog(spec=spec).meta()}
    return State(version=0, tensors=tensors, meta=meta)


def next_state(state: State, options: MergeOptions, factors: Mapping[str, Array], heads: Mapping[str, Array]) -> State:
    """The state after a step towards the mean factors (`b/<module>`, `a/<module>`) and along the heads' mean."""
    moments = under("moments", state.tensors)
    new, moments_f = step_toward(options, under("global", state.tensors), factors, moments)
    deltas, moments_h = step(options, heads, moments)
    log = PatchLog(spec=spec_of(state), version=state.version) if not heads else read_log(state)
    log = log.push(Payload(dense=deltas)) if heads else log
    tensors = prefixed("global", new) | prefixed("moments", moments_f | moments_h) | log.tensors()
    return State(version=state.version + 1, tensors=tensors, meta={**state.meta, "log": log.meta()})
