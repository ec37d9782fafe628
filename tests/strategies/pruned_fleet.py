"""A small model that can be pruned, updates of pruned devices, and the dense reference that goes index by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from toy_fleet import dense_of, noise_payload, update_of

from fedloom.protocols.messages import Axis, MatrixSpec, ModelSpec, Payload, Update
from fedloom.strategies.intake import product_sum
from fedloom.strategies.masked import scatter_payload, slice_payload

HEADS, CHANNELS = 4, 7
SPEC = ModelSpec(
    base_hash="toy",
    matrices={
        "qkv": MatrixSpec(d_out=29, d_in=18, kind="conv1d", rows=Axis(group="heads", width=2, offsets=(1, 9, 20))),
        "o": MatrixSpec(d_out=18, d_in=20, columns=Axis(group="heads", width=5)),
        "up": MatrixSpec(d_out=21, d_in=18, rows=Axis(group="channels", width=3)),
        "plain": MatrixSpec(d_out=18, d_in=18),
    },
    dense={"head.weight": (3, 5)},
    groups={"heads": HEADS, "channels": CHANNELS},
)
HALF = {"heads": np.array([False, True, True, False])}
BOTH = replace(SPEC, matrices={"w": MatrixSpec(d_out=8, d_in=21, rows=Axis(group="heads", width=2),
                                               columns=Axis(group="channels", width=3))})  # fmt: skip


def bits(size: int) -> st.SearchStrategy[Any]:
    return st.lists(st.booleans(), min_size=size, max_size=size).filter(any).map(np.array)


keeps = st.fixed_dictionaries({}, optional={"heads": bits(HEADS), "channels": bits(CHANNELS)})
clients = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 99), st.floats(0.25, 64.0), keeps), min_size=1, max_size=6
)


def answers(parts: Sequence[Any], spec: ModelSpec = SPEC, dtype: Any = np.float64, seed: int = 0) -> list[Update]:
    rng = np.random.default_rng(seed)
    whole = [noise_payload(rng, spec, rank, alpha, dtype=dtype) for rank, _, alpha, _ in parts]
    return [
        update_of(slice_payload(payload, spec, keep), f"d{i}", n)
        for i, (payload, (_, n, _, keep)) in enumerate(zip(whole, parts, strict=True))
    ]


def covered(axis: Axis | None, keep: Any, size: int) -> np.ndarray:
    """By the definition: index i is dropped if a dropped unit owns it."""
    mask = np.ones(size)
    if axis is not None and axis.group in keep:
        for u, kept in enumerate(keep[axis.group]):
            for offset in axis.offsets:
                for i in range(offset + u * axis.width, offset + (u + 1) * axis.width):
                    mask[i] = float(kept)
    return mask


def reference(updates: Sequence[Update], spec: ModelSpec = SPEC) -> dict[str, np.ndarray]:
    """sum_k n_k dW_k / sum_k n_k over the devices that keep both indices of an entry; the heads' plain mean."""
    out = {}
    for name, matrix in spec.matrices.items():
        total, weight = np.zeros((2, matrix.d_out, matrix.d_in))
        for update in updates:
            term, keep = update.payload.factors.get(name), update.payload.keep
            if term is None:
                continue
            r, c = covered(matrix.rows, keep, matrix.d_out), covered(matrix.columns, keep, matrix.d_in)
            part = term.scale * term.b.astype(np.float64) @ term.a.astype(np.float64)
            total[np.ix_(r > 0, c > 0)] += update.examples * part
            weight += update.examples * np.outer(r, c)
        out[name] = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    n = sum(update.examples for update in updates)
    for name in spec.dense:
        out[name] = sum(u.examples / n * u.payload.dense[name].astype(np.float64) for u in updates)
    return out


def mean_of(updates: Sequence[Update], spec: ModelSpec = SPEC, **options: Any) -> dict[str, np.ndarray]:
    total = product_sum(updates, spec, 0.0, **options)
    out = {name: np.zeros((matrix.d_out, matrix.d_in)) for name, matrix in spec.matrices.items()}
    out |= {name: delta.to_dense().astype(np.float64) for name, delta in total.matrices() if delta}
    return out | total.heads()


def dense_of_whole(payload: Payload) -> dict[str, np.ndarray]:
    out = dense_of(scatter_payload(payload, SPEC), SPEC)
    del out["coefficients"]
    return out
