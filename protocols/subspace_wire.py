"""Subspaces, scalars and coefficients as records and bytes, and back.

Legend: n scalars, K the dimensions of a subspace. Sizes follow from the record and are bounded before anything is made:
see `scalars_bytes` and coefficients_wire.py.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import validate
from fedloom.protocols.bitpack import index_bits, pack_bits, packed_bytes, unpack_bits
from fedloom.protocols.coefficients_wire import pack_steps, unpack_steps
from fedloom.protocols.directions import known_family
from fedloom.protocols.enums import DTYPES, FAMILIES, OVERS, SCOPES, member
from fedloom.protocols.framing import Buffer
from fedloom.protocols.messages import Coefficients, Over, Scalars, Subspace
from fedloom.protocols.quantize import load, store, stored_bytes

_LABEL: Final = "scalars"  # keys their stochastic rounding: a tensor's label holds a quoted name


def write_subspace(subspace: Subspace) -> pb.Subspace:
    """A subspace's record."""
    return pb.Subspace(
        family=FAMILIES[known_family(subspace.family)],
        k=subspace.k,
        seed=subspace.seed,
        scope=SCOPES[subspace.scope],
        rank=subspace.rank,
        alpha=subspace.alpha,
        rslora=subspace.rslora,
        mask=bytes.fromhex(subspace.mask),
        directions=subspace.directions,
    )


def read_subspace(record: pb.Subspace, where: str) -> Subspace:
    """The checked subspace of a record.

    Raises:
        ValueError: for a field that breaks its bounds.
    """
    subspace = Subspace(
        family=member(FAMILIES, record.family, f"family of {where}"),
        k=record.k,
        seed=record.seed,
        scope=member(SCOPES, record.scope, f"scope of {where}"),
        rank=record.rank,
        alpha=record.alpha,
        rslora=record.rslora,
        mask=record.mask.hex(),
        directions=record.directions,
    )
    validate.check_subspace(where, subspace)
    return subspace


def write_scalars(scalars: Scalars, wire: str, seed: int) -> tuple[pb.Scalars, list[Buffer]]:
    """The record of scalars and their bytes: the values as `wire`, then the packed indices.

    Equal values over a pool, such as the weights of listed directions, travel as one.

    Raises:
        ValueError: for values that `wire` cannot hold.
    """
    values, count = scalars.values, len(scalars.values)
    bits = np.asarray(values, np.float32).view(np.uint32)
    equal = scalars.indices is not None and min(count, scalars.k) > 1 and bool((bits == bits[0]).all())
    stored = store(values[:1] if equal else values, wire, axis=None, label=_LABEL, seed=seed)
    data: list[Buffer] = [part.reshape(-1).view(np.uint8).data for part in stored]
    if scalars.indices is not None:
        data.append(pack_bits(scalars.indices, index_bits(scalars.k)))
    record = pb.Scalars(
        over=OVERS[scalars.over], k=scalars.k, dtype=DTYPES[wire], count=count, seed=scalars.seed, equal=equal
    )
    return record, data


def scalars_bytes(record: pb.Scalars, where: str) -> int:
    """How many bytes the scalars of a record take.

    Raises:
        ValueError: for sizes that break their bounds.
    """
    over = member(OVERS, record.over, f"{where}.over")
    wire = member(DTYPES, record.dtype, f"dtype of {where}")
    validate.scalar_sizes(where, over, record.k, record.count)
    if record.equal and (over != Over.POOL or min(record.count, record.k) < 2):
        raise ValueError(
            f"equal values of {where} must be 2 or more over a pool of 2 or more, "
            f"got {record.count} over {over} of {record.k}"
        )
    values = stored_bytes(wire, (_values_sent(record),), None)
    return values + (packed_bytes(record.count, index_bits(record.k)) if over == Over.POOL else 0)


def read_scalars(record: pb.Scalars, data: memoryview, where: str) -> Scalars:
    """The scalars that a record describes, `data` being exactly their bytes.

    Raises:
        ValueError: for a value that is not finite, an index beyond k, or bits that mean nothing.
    """
    over, wire = member(OVERS, record.over, where), member(DTYPES, record.dtype, where)
    sent = _values_sent(record)
    split = stored_bytes(wire, (sent,), None)
    values = load(data[:split], wire, (sent,), axis=None, label=where)
    if record.equal:
        values = np.repeat(values, record.count)
    indices = unpack_bits(data[split:], record.count, index_bits(record.k)) if over == Over.POOL else None
    if indices is not None and int(indices.max()) >= record.k:
        raise ValueError(f"indices of {where} must be in 0..{record.k - 1}, got {indices.max()}")
    return Scalars(over=over, k=record.k, values=values, indices=indices, seed=record.seed)


def _values_sent(record: pb.Scalars) -> int:
    return 1 if record.equal else int(record.count)


def write_coefficients(coefficients: Coefficients) -> tuple[pb.Coefficients, Buffer]:
    """The record of coefficients, and their steps as bytes: the same ones whatever the wire."""
    data = pack_steps(coefficients.steps)
    record = pb.Coefficients(
        subspace=write_subspace(coefficients.subspace), exponent=coefficients.exponent, data_bytes=len(data)
    )
    return record, data


def read_coefficients(record: pb.Coefficients, data: memoryview, where: str) -> Coefficients:
    """The coefficients of a record, `data` being exactly their bytes.

    Raises:
        ValueError: for a field that breaks its bounds, or bytes that `pack_steps` cannot have made.
    """
    if not record.HasField("subspace"):
        raise ValueError(f"{where} must carry its subspace")
    subspace = read_subspace(record.subspace, f"{where}.subspace")
    steps = unpack_steps(data, subspace.k)
    return Coefficients(subspace=subspace, exponent=record.exponent, steps=steps)
