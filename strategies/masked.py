"""Updates of pruned models: from the units that each device keeps to the whole model, and back to a device's slice.

    dW[o, i] = sum_{k keeps o, i} p_k s_k (B_k A_k)[o, i] / sum_{k keeps o, i} p_k        0 where no device keeps o, i

FedSpine prunes whole attention heads (the rows of q, k, v and the columns of o) and FFN channels (the rows of gate and
up, the columns of down), so one side of a matrix is pruned and the weight depends on that side alone:

    dW = D_out^-1 M   or   M D_in^-1,    M = sum_k p_k s_k S_k B_k A_k T_k,    D_out = diag(sum_{k keeps o} p_k)

That scales the rows of the stacked B, or the columns of the stacked A: still exact, and of no higher rank. Where both
sides of one matrix may be pruned, the weight of an entry is a sum of products of two masks, which is diagonal on
neither side: the matrix is then divided entry by entry, and so is dense. FedPipe gives devices different sets of
modules: p_k is n_k over the sum of those devices that have the module.

Legend: b [kept rows, r] and a [r, kept columns] as they travel, B [d_out, r] and A [r, d_in] at full size; S_k and T_k
put kept rows and columns in their places; D_out [d_out, d_out], D_in [d_in, d_in]; keep: bool [units] by group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import Array, Axis, LowRank, MatrixSpec, ModelSpec, Patch, Payload, unscaled
from fedloom.protocols.validate import check_keep
from fedloom.strategies.lowrank import Accumulator, Delta

T = TypeVar("T")
Bits = NDArray[np.bool_]
Keep = Mapping[str, Bits]


def side(axis: Axis | None, keep: Keep, size: int) -> Bits | None:
    """Which of a side's `size` indices are kept, bool [size]; None where all are. What no unit owns is always kept."""
    if axis is None or axis.group not in keep or keep[axis.group].all():
        return None
    mask = np.ones(size, np.bool_)
    owned = np.repeat(keep[axis.group], axis.width)
    for offset in axis.offsets:
        mask[offset : offset + len(owned)] = owned
    return mask


def indices(axis: Axis | None, keep: Keep, size: int) -> NDArray[np.int64]:
    """The kept indices of a side of `size`, ascending: the order in which kept rows and columns travel."""
    mask = side(axis, keep, size)
    return np.arange(size) if mask is None else np.flatnonzero(mask)


def sides(matrix: MatrixSpec, keep: Keep) -> tuple[Bits | None, Bits | None]:
    """The kept rows and the kept columns of a matrix, as `side` gives them."""
    return side(matrix.rows, keep, matrix.d_out), side(matrix.columns, keep, matrix.d_in)


def pruned(spec: ModelSpec, keep: Keep) -> ModelSpec:
    """The spec of a pruned model: the sizes of what is kept, and where the kept units lie.

    Makes no array, whatever the sizes.

    Raises:
        ValueError: for keep-bitmaps that are not of the spec's groups.
    """
    check_keep("keep", keep, spec.groups)
    counts = {group: int(keep[group].sum()) if group in keep else units for group, units in spec.groups.items()}

    def shrunk(axis: Axis | None, size: int) -> tuple[Axis | None, int]:
        if axis is None:
            return None, size
        gone = (spec.groups[axis.group] - counts[axis.group]) * axis.width
        offsets = tuple(offset - place * gone for place, offset in enumerate(axis.offsets))
        return replace(axis, offsets=offsets), size - len(offsets) * gone

    matrices = {}
    for name, matrix in spec.matrices.items():
        rows, d_out = shrunk(matrix.rows, matrix.d_out)
        columns, d_in = shrunk(matrix.columns, matrix.d_in)
        matrices[name] = replace(matrix, d_out=d_out, d_in=d_in, rows=rows, columns=columns)
    return replace(spec, matrices=matrices, groups=counts)


def check_within(where: str, keep: Keep, allowed: Keep) -> None:
    """Raise ValueError unless keep-bitmaps are of groups in `allowed` and keep nothing that is dropped there.

    Both must have been held against one spec. A group that `keep` does not name is kept whole.
    """
    for group in keep:
        if group not in allowed:
            raise ValueError(f"{where} must keep {group!r} whole, got a keep-bitmap of it")
    for group, bits in allowed.items():
        extra = ~bits if group not in keep else keep[group] & ~bits
        if extra.any():
            raise ValueError(f"{where} must keep no unit of {group!r} that was dropped, got unit {int(extra.argmax())}")


def covers(known: Keep, wanted: Keep) -> bool:
    """Whether the units of `known` are all of those in `wanted`; a group that either does not name is whole.

    Both must have been held against one spec.
    """
    return not any((wanted.get(group, np.True_) & ~bits).any() for group, bits in known.items())


def in_both(one: Keep, other: Keep) -> dict[str, Bits]:
    """The units that two keeps have in common, without the groups that are whole in both."""
    common = {**one, **other, **{group: one[group] & other[group] for group in one.keys() & other.keys()}}
    return {group: bits for group, bits in common.items() if not bits.all()}


def scatter(term: LowRank, matrix: MatrixSpec, keep: Keep) -> LowRank:
    """A pruned model's term at full size: b [d_out, r] and a [r, d_in], zero where nothing was kept.

    Raises:
        ValueError: for factors that do not have the kept rows and columns.
    """
    rows, columns = sides(matrix, keep)
    wanted = (_count(rows, matrix.d_out), _count(columns, matrix.d_in))
    _check_sizes("a pruned term", term, wanted)
    b, a = term.b, term.a
    if rows is not None:
        b = np.zeros((matrix.d_out, term.rank), term.b.dtype)
        b[rows] = term.b
    if columns is not None:
        a = np.zeros((term.rank, matrix.d_in), term.a.dtype)
        a[:, columns] = term.a
    return term if rows is None and columns is None else replace(term, b=b, a=a)


def slice_term(term: LowRank, matrix: MatrixSpec, keep: Keep) -> LowRank:
    """The rows and columns of a term that are kept: b [kept rows, r], a [r, kept columns].

    Raises:
        ValueError: for a term that is not of the whole matrix.
    """
    _check_sizes("a term to slice", term, (matrix.d_out, matrix.d_in))
    rows, columns = sides(matrix, keep)
    b = term.b if rows is None else np.ascontiguousarray(term.b[rows])
    a = term.a if columns is None else np.ascontiguousarray(term.a[:, columns])
    return term if rows is None and columns is None else replace(term, b=b, a=a)


def _count(mask: Bits | None, size: int) -> int:
    return size if mask is None else int(mask.sum())


def _check_sizes(what: str, term: LowRank, wanted: tuple[int, int]) -> None:
    if (term.b.shape[0], term.a.shape[1]) != wanted:
        raise ValueError(
            f"{what} must have b [{wanted[0]}, r] and a [r, {wanted[1]}], got {term.b.shape} and {term.a.shape}"
        )


class _Cut(Mapping[str, T]):
    """Values cut anew each time they are asked for: a slice for every device, and no copy of any."""

    def __init__(self, whole: Mapping[str, T], cut: Callable[[str, T], T]) -> None:
        self._whole, self._cut = whole, cut

    def __getitem__(self, name: str) -> T:
        return self._cut(name, self._whole[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


def _slice_view(payload: Payload, spec: ModelSpec, keep: Keep) -> Payload:
    """`slice_payload` without its copies: its tensors are cut when they are read."""
    check_keep("keep", keep, spec.groups)
    if payload.keep or payload.scalars is not None or payload.coefficients is not None:
        raise ValueError("a payload to slice must be of the whole model, in factors and dense terms")
    unknown = (payload.factors.keys() | payload.dense.keys()) - (spec.matrices.keys() | spec.dense.keys())
    if unknown:
        raise ValueError(f"a payload to slice must name what the model has, got {sorted(unknown)[:3]}")

    def dense(name: str, value: Array) -> Array:
        matrix = spec.matrices.get(name)
        if matrix is None:
            return value
        rows, columns = indices(matrix.rows, keep, matrix.d_out), indices(matrix.columns, keep, matrix.d_in)
        cut: Array = np.ascontiguousarray(value[rows][:, columns])
        return cut

    factors = _Cut(payload.factors, lambda name, term: slice_term(term, spec.matrices[name], keep))
    return Payload(factors=factors, dense=_Cut(payload.dense, dense), keep=dict(keep))


def slice_payload(payload: Payload, spec: ModelSpec, keep: Keep) -> Payload:
    """A device's own part of a patch or an adapter, with its `keep`; heads stay whole, no keep leaves all as it is.

    Raises:
        ValueError: for a payload that is a slice already or moves along a subspace, bitmaps that are not of the spec's
            groups, or a name that the spec does not know.
    """
    if not keep:
        return payload
    view = _slice_view(payload, spec, keep)
    return Payload(factors=dict(view.factors), dense=dict(view.dense), keep=view.keep)


def slice_patch(patch: Patch | None, spec: ModelSpec, keep: Keep) -> Patch | None:
    """What of a patch a device needs that may keep these units alone; as it is where that is all of it.

    `keep` is what the server knows the device to have pruned to, not what a task asks of it: until the device has
    answered, a later task may still let it keep more. Tensors are cut when they are read: patches for many devices
    take no more memory than one.

    Raises:
        ValueError: as slice_payload.
    """
    if patch is None or not patch.payload or all(bits.all() for bits in keep.values()):
        return patch
    return replace(patch, payload=_slice_view(patch.payload, spec, keep))


def scatter_payload(payload: Payload, spec: ModelSpec) -> Payload:
    """A pruned model's payload at full size, without a keep: zero where nothing was kept.

    Raises:
        ValueError: for bitmaps that are not of the spec's groups, or shapes that are not theirs.
    """
    if not payload.keep:
        return payload
    check_keep("keep", payload.keep, spec.groups)
    factors = {name: scatter(term, spec.matrices[name], payload.keep) for name, term in payload.factors.items()}
    dense = dict(payload.dense)
    for name in dense.keys() & spec.matrices.keys():
        matrix = spec.matrices[name]
        rows = indices(matrix.rows, payload.keep, matrix.d_out)
        columns = indices(matrix.columns, payload.keep, matrix.d_in)
        whole = np.zeros((matrix.d_out, matrix.d_in), dense[name].dtype)
        whole[np.ix_(rows, columns)] = dense[name]
        dense[name] = whole
    return Payload(factors=factors, dense=dense)


class MaskedAccumulator:
    """The streaming mean of one matrix's updates, each row and column over the devices that keep it.

    Memory is lowrank.Accumulator's and a weight for each row or column, whatever the number of devices; a matrix that
    may be pruned on both sides adds a weight for each entry once an update is. Until an update is pruned nothing is
    weighed, and what comes out is the plain mean, bit for bit.
    """

    def __init__(self, matrix: MatrixSpec) -> None:
        self._matrix = matrix
        self._sum = Accumulator(matrix)
        self._weight = 0.0
        self._coverage: NDArray[np.float64] | None = None  # summed weights: [d_out, 1], [1, d_in] or [d_out, d_in]

    def add(self, term: LowRank, weight: float, keep: Keep, share: float = 1.0) -> None:
        """One update's term, multiplied by `share`, at full size or with the keep's rows and columns.

        Raises:
            ValueError: for factors that do not have the kept rows and columns.
        """
        whole = scatter(term, self._matrix, keep)
        self._sum.add(whole, weight * share)
        rows, columns = sides(self._matrix, keep)
        if self._coverage is None and (rows is not None or columns is not None):
            shape = (
                self._matrix.d_out if self._matrix.rows is not None else 1,
                self._matrix.d_in if self._matrix.columns is not None else 1,
            )
            self._coverage = np.full(shape, self._weight)
        if self._coverage is not None:
            by_row = 1.0 if rows is None else rows[:, None].astype(np.float64)
            by_column = 1.0 if columns is None else columns[None, :].astype(np.float64)
            self._coverage += weight * (by_row * by_column)
        self._weight += weight

    def add_term(self, term: LowRank, weight: float) -> None:
        """One more term of full size, that does not count as an update."""
        self._sum.add(term, weight)

    def finish(self) -> Delta:
        """The mean; zero where no device kept anything. The accumulator is empty afterwards."""
        mean = self._sum.finish(self._weight)
        coverage, weight = self._coverage, self._weight
        self._coverage, self._weight = None, 0.0
        if coverage is None or not mean or bool((coverage == weight).all()):
            return mean
        gain = np.divide(weight, coverage, out=np.zeros_like(coverage), where=coverage > 0)
        return _scaled(mean, gain)


def _scaled(delta: Delta, gain: NDArray[np.float64]) -> Delta:
    """An unscaled matrix times a gain for each row [d_out, 1], column [1, d_in] or entry [d_out, d_in]."""

    def times(x: Array) -> Array:
        product: Array = x * gain.astype(x.dtype)
        return product

    if delta.factors is None or min(gain.shape) > 1:
        return Delta(dense=times(delta.to_dense()))
    b, a = delta.factors.b, delta.factors.a
    return Delta(factors=unscaled(times(b), a) if gain.shape[1] == 1 else unscaled(b, times(a)))
