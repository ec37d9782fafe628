"""A payload as a description and tensor data, and back.

Legend: r rank; b [d_out, r], a [r, d_in]. int8 keeps one scale for each of the r rank-one terms of a factor (a column
of b, a row of a), because it is these that differ in size; a dense tensor keeps one for each row, a vector one in all.

Tensor data holds the tensors, each padded to ALIGN so that fp32 ones can be viewed where they lie, then the scalars and
the coefficients of subspace_wire.py, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import validate
from fedloom.protocols.bitpack import join_bits, split_bits
from fedloom.protocols.enums import DTYPES, member
from fedloom.protocols.framing import ALIGN, Buffer, checksum, padding
from fedloom.protocols.messages import Array, LowRank, Payload
from fedloom.protocols.quantize import Float32, known_wire, load, store, stored_bytes
from fedloom.protocols.subspace_wire import (
    read_coefficients,
    read_scalars,
    scalars_bytes,
    write_coefficients,
    write_scalars,
)


@dataclass(frozen=True)
class PackedPayload:
    """A payload ready for a frame: what describes it, and its tensor data in pieces."""

    header: pb.Payload
    data: tuple[Buffer, ...]

    def joined(self) -> PackedPayload:
        """The same with its data copied into one piece, independent of the arrays that it came from."""
        return PackedPayload(self.header, (b"".join(self.data),))


def pack_payload(payload: Payload, wire: str, seed: int) -> PackedPayload:
    """Describe and store every tensor of a payload.

    fp32 arrays are not copied: the pieces are views of them.

    Raises:
        ValueError: for a tensor that `wire` cannot hold.
    """
    known_wire(wire)
    header, data = pb.Payload(), list[Buffer]()

    def add(tensor: Array, axis: int | None, label: str) -> pb.Tensor:
        for stored in store(tensor, wire, axis=axis, label=label, seed=seed):
            data.append(stored.reshape(-1).view(np.uint8).data)
        data.append(padding(stored_bytes(wire, tensor.shape, axis)))
        return pb.Tensor(dtype=DTYPES[wire], shape=tensor.shape)

    for name, factor in payload.factors.items():
        described = header.factors.add(name=name, rank=factor.rank, alpha=factor.alpha, rslora=factor.rslora)
        described.b.CopyFrom(add(factor.b, 1, f"b of {name!r}"))
        described.a.CopyFrom(add(factor.a, 0, f"a of {name!r}"))
    for name, tensor in payload.dense.items():
        header.dense.add(name=name, tensor=add(tensor, _dense_axis(tensor.ndim), f"dense {name!r}"))
    if payload.scalars is not None:
        scalars, pieces = write_scalars(payload.scalars, wire, seed)
        header.scalars.CopyFrom(scalars)
        data += pieces
    if payload.coefficients is not None:
        coefficients, piece = write_coefficients(payload.coefficients)
        header.coefficients.CopyFrom(coefficients)
        data.append(piece)
    for group, bits in payload.keep.items():
        header.keep.add(name=group, units=bits.size, bits=join_bits(bits))
    header.data_bytes = sum(len(piece) for piece in data)
    header.data_crc32 = checksum(data)
    return PackedPayload(header, tuple(data))


def unpack_payload(header: pb.Payload, data: memoryview, where: str) -> tuple[Payload, memoryview]:
    """The payload that `header` describes, read from the start of `data`, and what follows it.

    Every size is checked before the first array is made. fp32 tensors are read-only views of `data`; the others take at
    most 4 bytes a byte of it.

    Raises:
        ValueError: for sizes that do not agree, a wrong checksum, or a tensor that breaks its bounds.
    """
    if header.data_bytes > len(data):
        raise ValueError(f"tensor data of {where} must have {header.data_bytes} bytes, {len(data)} are left")
    if 2 * len(header.factors) + len(header.dense) > validate.MAX_ENTRIES:
        raise ValueError(f"{where} must have <= {validate.MAX_ENTRIES} tensors")
    validate.names(f"{where}.factors", (entry.name for entry in header.factors), len(header.factors))
    validate.names(f"{where}.dense", (entry.name for entry in header.dense), len(header.dense))
    keep = _read_keep(header, f"{where}.keep")
    plans = [plan for entry in header.factors for plan in _factor_plans(entry)]
    plans += [_Plan.of(entry.tensor, f"dense {entry.name!r}") for entry in header.dense]
    scalars = scalars_bytes(header.scalars, f"{where}.scalars") if header.HasField("scalars") else 0
    announced = sum(plan.padded for plan in plans) + scalars + header.coefficients.data_bytes
    if announced != header.data_bytes:
        raise ValueError(f"shapes of {where} need {announced} bytes, its tensor data has {header.data_bytes}")
    mine, rest = data[: header.data_bytes], data[header.data_bytes :]
    if (crc := checksum([mine])) != header.data_crc32:
        raise ValueError(f"{where} is damaged: checksum must be {header.data_crc32:#010x}, got {crc:#010x}")
    arrays, left = list[Float32](), mine
    for plan in plans:
        arrays.append(plan.read(left))
        if any(left[plan.stored : plan.padded]):
            raise ValueError(
                f"what pads {plan.label} of {where} must be zeros, got {bytes(left[plan.stored : plan.padded])!r}"
            )
        left = left[plan.padded :]
    values = iter(arrays)
    factors = {
        entry.name: LowRank(b=next(values), a=next(values), alpha=entry.alpha, rslora=entry.rslora)
        for entry in header.factors
    }
    payload = Payload(
        factors=factors,
        dense={entry.name: next(values) for entry in header.dense},
        scalars=read_scalars(header.scalars, left[:scalars], f"{where}.scalars")
        if header.HasField("scalars")
        else None,
        coefficients=read_coefficients(header.coefficients, left[scalars:], f"{where}.coefficients")
        if header.HasField("coefficients")
        else None,
        keep=keep,
    )
    return payload, rest


def _read_keep(header: pb.Payload, where: str) -> dict[str, NDArray[np.bool_]]:
    """The keep-bitmaps of a header, bool [units] by group: 8 bytes a byte of it, MAX_UNITS in all."""
    validate.names(where, (entry.name for entry in header.keep), len(header.keep))
    validate.unit_counts(where, {entry.name: entry.units for entry in header.keep})
    keep: dict[str, NDArray[np.bool_]] = {}
    for entry in header.keep:
        try:
            keep[entry.name] = split_bits(entry.bits, entry.units).view(np.bool_)
        except ValueError as error:
            raise ValueError(f"{where}[{entry.name!r}]: {error}") from None
        keep[entry.name].flags.writeable = False
    return keep


@dataclass(frozen=True)
class _Plan:
    """Where a tensor's bytes end and what they mean."""

    wire: str
    shape: tuple[int, ...]
    axis: int | None
    label: str
    stored: int

    @classmethod
    def of(cls, tensor: pb.Tensor, label: str, factor_axis: int | None = None) -> _Plan:
        wire = member(DTYPES, tensor.dtype, f"dtype of {label}")
        validate.shape(label, tensor.shape, least_last=0 if factor_axis == 0 else 1)  # A alone may be empty
        shape = tuple(tensor.shape)
        axis = _dense_axis(len(shape)) if factor_axis is None else factor_axis
        if factor_axis is not None and len(shape) != 2:
            raise ValueError(f"{label} must have 2 dimensions, got {list(shape)}")
        return cls(wire, shape, axis, label, stored_bytes(wire, shape, axis))

    @property
    def padded(self) -> int:
        return self.stored + -self.stored % ALIGN

    def read(self, data: memoryview) -> Float32:
        return load(data[: self.stored], self.wire, self.shape, axis=self.axis, label=self.label)


def _factor_plans(entry: pb.LowRank) -> tuple[_Plan, _Plan]:
    b, a = _Plan.of(entry.b, f"b of {entry.name!r}", 1), _Plan.of(entry.a, f"a of {entry.name!r}", 0)
    if not b.shape[1] == a.shape[0] == entry.rank:
        raise ValueError(f"factors of {entry.name!r} must have rank {entry.rank}, got {list(b.shape)}, {list(a.shape)}")
    validate.positive(f"alpha of {entry.name!r}", entry.alpha)
    return b, a


def _dense_axis(dims: int) -> int | None:
    return None if dims == 1 else 0
