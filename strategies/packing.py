"""A strategy's memory as named tensors and JSON: the model's spec, and payloads under a prefix.

<prefix>/b/<module>, <prefix>/a/<module>    unscaled factors, so that alpha and rank need no place of their own
<prefix>/dense/<name>                       dense terms
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fedloom.protocols.messages import Array, Axis, MatrixSpec, ModelSpec, Payload, unscaled
from fedloom.protocols.shapes import Block, Linear, Shapes
from fedloom.strategies.base import State
from fedloom.strategies.lowrank import Delta, fold


def spec_to_meta(spec: ModelSpec) -> dict[str, Any]:
    """A spec as JSON-able tables."""
    table = {
        "base_hash": spec.base_hash,
        "matrices": {name: [matrix.d_out, matrix.d_in, matrix.kind] for name, matrix in spec.matrices.items()},
        "dense": {name: list(shape) for name, shape in spec.dense.items()},
        "mask": spec.mask,
    }
    if spec.groups:  # a model that cannot be pruned has the table it always had
        axes = {name: [_axis_table(matrix.rows), _axis_table(matrix.columns)] for name, matrix in spec.matrices.items()}
        table |= {"groups": dict(spec.groups), "axes": {name: pair for name, pair in axes.items() if any(pair)}}
    if spec.shapes is not None:
        shapes = asdict(spec.shapes)
        table["shapes"] = shapes | {"blocks": list(shapes["blocks"])}  # as JSON gives it back
    return table


def _axis_table(axis: Axis | None) -> list[Any] | None:
    return None if axis is None else [axis.group, axis.width, list(axis.offsets)]


def _axis_from(table: Sequence[Any] | None) -> Axis | None:
    return None if table is None else Axis(group=table[0], width=table[1], offsets=tuple(table[2]))


def spec_of(state: State) -> ModelSpec:
    """The spec that a state was made for."""
    return spec_from_meta(state.meta["spec"])


def spec_from_meta(table: Mapping[str, Any]) -> ModelSpec:
    """The spec of `spec_to_meta`'s tables."""
    axes = table.get("axes", {})
    matrices: dict[str, MatrixSpec] = {}
    for name, (d_out, d_in, kind) in table["matrices"].items():
        rows, columns = (_axis_from(axis) for axis in axes.get(name, (None, None)))
        matrices[name] = MatrixSpec(d_out=d_out, d_in=d_in, kind=kind, rows=rows, columns=columns)
    return ModelSpec(
        base_hash=table["base_hash"],
        matrices=matrices,
        dense={name: tuple(shape) for name, shape in table["dense"].items()},
        mask=table["mask"],
        groups=dict(table.get("groups", {})),
        shapes=_shapes_from(table["shapes"]) if "shapes" in table else None,
    )


def _shapes_from(table: Mapping[str, Any]) -> Shapes:
    blocks = tuple(Block(**block) for block in table["blocks"])
    linears = {name: Linear(**linear) for name, linear in table["linears"].items()}
    return Shapes(**{**table, "blocks": blocks, "linears": linears})


def pack(prefix: str, payload: Payload) -> dict[str, Array]:
    """The tensors of a payload, contiguous and unscaled."""
    tensors: dict[str, Array] = {}
    for name, term in payload.factors.items():
        folded = fold(term)
        tensors[f"{prefix}/b/{name}"] = np.ascontiguousarray(folded.b)
        tensors[f"{prefix}/a/{name}"] = np.ascontiguousarray(folded.a)
    for name, value in payload.dense.items():
        tensors[f"{prefix}/dense/{name}"] = np.ascontiguousarray(value)
    return tensors


def unpack(prefix: str, tensors: Mapping[str, Array]) -> Payload:
    """The payload that `pack` wrote; empty when there is none."""
    factors = {
        name: unscaled(value, tensors[f"{prefix}/a/{name}"]) for name, value in under(f"{prefix}/b", tensors).items()
    }
    return Payload(factors=factors, dense=under(f"{prefix}/dense", tensors))


def under(prefix: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors whose names start with `prefix/`, by the rest of their names."""
    start = f"{prefix}/"
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def prefixed(prefix: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors, contiguous, with `prefix/` before their names."""
    return {f"{prefix}/{name}": np.ascontiguousarray(value) for name, value in tensors.items()}


def pack_deltas(prefix: str, deltas: Mapping[str, Delta]) -> dict[str, Array]:
    """The tensors of matrices by module name."""
    return pack(
        prefix,
        Payload(
            factors={name: delta.factors for name, delta in deltas.items() if delta.factors is not None},
            dense={name: delta.dense for name, delta in deltas.items() if delta.dense is not None},
        ),
    )


def unpack_delta(prefix: str, name: str, tensors: Mapping[str, Array]) -> Delta:
    """One matrix of what `pack_deltas` wrote."""
    b = tensors.get(f"{prefix}/b/{name}")
    factors = None if b is None else unscaled(b, tensors[f"{prefix}/a/{name}"])
    return Delta(factors=factors, dense=tensors.get(f"{prefix}/dense/{name}"))
