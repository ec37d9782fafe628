"""Sums of low-rank terms: their norms, their best rank-r approximation and their addition, without forming the matrix.

    M = sum_i s_i B_i A_i (+ D) = U S V^T,    kept = (M V_r) V_r^T,    residual = M - kept = B (A - (A V_r) V_r^T)

Eckart and Young (1936) for the best rank-r approximation; FLoRIST (2025) for the SVD of a stack through its small core.
The residual is made from the kept right vectors V_r, whatever they are: kept + residual is M up to rounding.

Legend: M [d_out, d_in]; B [d_out, R] and A [R, d_in] the stacked factors; D [d_out, d_in] a dense term; V_r [d_in, r].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import Array, Coefficients, LowRank, MatrixSpec, ModelSpec, Payload, unscaled
from fedloom.strategies.coefficients import plus as plus_coefficients
from fedloom.strategies.spectrum import leading

RECOMPRESS = 1024  # looking for a lower numerical rank in a taller stack costs more than it ever saves
CHUNK = 256  # ranks gathered before they are added to a dense sum in one product


def as_float(x: Array) -> Array:
    """float32 and float64 as they are, anything narrower as float32."""
    return x if x.dtype in (np.float32, np.float64) else x.astype(np.float32)


def tolerance(dtype: np.dtype[Any]) -> float:
    """Singular values below this share of the largest are rounding: 1e-7 in float32, 1e-14 in float64."""
    return 1e-7 if dtype == np.float32 else 1e-14


def break_even(d_out: int, d_in: int) -> float:
    """The rank from which factors are no smaller than the dense matrix."""
    return d_out * d_in / (d_out + d_in)


def fold(term: LowRank) -> LowRank:
    """The same product with a scale of 1, the scale folded into b."""
    if term.scale == 1.0:
        return unscaled(as_float(term.b), as_float(term.a))
    return unscaled(as_float(term.b) * term.scale, as_float(term.a))


def stack(terms: Sequence[LowRank]) -> LowRank:
    """The sum of terms as one unscaled term: b = [s_1 B_1 ... s_K B_K], a = [A_1; ...; A_K]."""
    if not terms:
        raise ValueError("a stack must have at least one term, got none")
    if len(terms) == 1:
        return fold(terms[0])
    parts = [fold(term) for term in terms]
    return unscaled(np.concatenate([p.b for p in parts], axis=1), np.concatenate([p.a for p in parts], axis=0))


def inner(x: LowRank, y: LowRank) -> float:
    """The Frobenius inner product <X, Y> = s_x s_y trace((B_x^T B_y)(A_y A_x^T)), in float64."""
    bb: NDArray[np.float64] = x.b.astype(np.float64).T @ y.b.astype(np.float64)
    aa: NDArray[np.float64] = x.a.astype(np.float64) @ y.a.astype(np.float64).T
    return x.scale * y.scale * float(np.vdot(bb, aa))


def product_norm(term: LowRank) -> float:
    """||s B A||_F from r x r Gram matrices: the same for every (B M)(M^-1 A)."""
    return math.sqrt(max(inner(term, term), 0.0))


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One matrix as the sum of a factored and a dense term; without either it is zero."""

    factors: LowRank | None = None
    dense: Array | None = None

    def __bool__(self) -> bool:
        return self.factors is not None or self.dense is not None

    def times(self, c: float) -> Delta:
        """c times this matrix."""
        factors = self.factors
        if factors is not None and c != 1.0:
            factors = unscaled(factors.b * (c * factors.scale), factors.a)
        return Delta(factors=factors, dense=self.dense if self.dense is None or c == 1.0 else self.dense * c)

    def to_dense(self) -> Array:
        """The matrix itself, [d_out, d_in]; a delta without terms has no size and cannot be made dense."""
        if self.factors is None:
            if self.dense is None:
                raise ValueError("a delta must have a term to be made dense, got none")
            return self.dense
        product = as_float(self.factors.dense())
        return product if self.dense is None else product + self.dense


def plus(newer: Delta, older: Delta) -> Delta:
    """The sum: factors stacked newest first, dense terms added."""
    terms = [delta.factors for delta in (newer, older) if delta.factors is not None]
    dense = [delta.dense for delta in (newer, older) if delta.dense is not None]
    return Delta(factors=stack(terms) if terms else None, dense=sum(dense[1:], dense[0]) if dense else None)


def compact(delta: Delta) -> Delta:
    """Dense when that is no larger than the factors, or when a dense term is there to take the factors in."""
    if delta.factors is None:
        return delta
    d_out, d_in = delta.factors.b.shape[0], delta.factors.a.shape[1]
    if delta.dense is None and delta.factors.rank < break_even(d_out, d_in):
        return delta
    return Delta(dense=delta.to_dense())


def delta_norm(delta: Delta) -> float:
    """||M||_F; through Gram matrices unless a dense term is there."""
    if delta.dense is not None:
        return float(np.linalg.norm(delta.to_dense().astype(np.float64)))
    return 0.0 if delta.factors is None else product_norm(delta.factors)


def payload_norm(payload: Payload) -> float:
    """The Frobenius norm of a whole payload: over all its matrices and its dense tensors."""
    square = sum(float(np.vdot(x64 := x.astype(np.float64), x64)) for name, x in payload.dense.items())
    for name, term in payload.factors.items():
        square += max(inner(term, term), 0.0)
        if name in payload.dense:
            cross = term.b.astype(np.float64).T @ payload.dense[name].astype(np.float64)
            square += 2.0 * term.scale * float(np.vdot(cross, term.a.astype(np.float64)))
    return math.sqrt(max(square, 0.0))


def _signs(v: Array) -> Array:
    """+-1 per row of v [r, d_in], so that its entry of largest magnitude is positive."""
    peaks = v[np.arange(v.shape[0]), np.argmax(np.abs(v), axis=1)]
    return np.where(peaks < 0, -1.0, 1.0).astype(v.dtype)[:, None]


def _count(s: Array, total: float, cap: int, energy: float, tol: float) -> int:
    """How many of the singular values s to keep: the cap, the energy share or the numerical rank, the least."""
    kept = min(cap, int(np.sum(s > tol * s[0])) if s.size and s[0] > 0 else 0)
    if energy < 1.0 and kept:
        share = np.cumsum(s.astype(np.float64) ** 2) / total
        kept = min(kept, int(np.searchsorted(share, energy * (1.0 - 1e-12))) + 1)
    return kept


def truncate(delta: Delta, cap: int, energy: float = 1.0) -> tuple[LowRank | None, Delta]:
    """The best approximation of rank <= cap that keeps at least an energy share, and what it leaves.

    Args:
        delta: M, [d_out, d_in].
        cap: the largest rank, >= 1.
        energy: the share of ||M||_F^2 in (0, 1] that is enough; the cap goes first.

    Returns:
        kept: unscaled, b = U S and a = V^T with orthonormal rows, strongest first; None when M is zero.
        residual: M - kept, in the form that M had; empty when nothing but rounding was cut.
    """
    if cap < 1 or not 0 < energy <= 1:
        raise ValueError(f"a truncation must have a cap >= 1 and an energy in (0, 1], got {cap} and {energy}")
    if not delta:
        return None, Delta()
    s, v = leading(delta.factors, delta.dense, cap + 1)
    total = 0.0
    if energy < 1.0:
        total = delta_norm(delta) ** 2
    tol = tolerance(v.dtype)
    kept = _count(s, total, cap, energy, tol)
    if kept == 0:
        return None, Delta()
    cut = kept < s.size and s[kept] > tol * s[0]
    v = np.ascontiguousarray(v[:kept])
    v *= _signs(v)
    b, residual = _split(delta, v)
    return unscaled(b, v), residual if cut else Delta()


def _split(delta: Delta, v: Array) -> tuple[Array, Delta]:
    """M V, and M (I - V V^T) in the form that M had, for orthonormal rows v = V^T [r, d_in]."""
    b: Array | None = None
    factors, dense = None, None
    if delta.factors is not None:
        term = fold(delta.factors)
        a_v = term.a @ v.T
        b = term.b @ a_v
        factors = unscaled(term.b, term.a - a_v @ v)
    if delta.dense is not None:
        d_v = delta.dense @ v.T
        b = d_v if b is None else b + d_v
        dense = delta.dense - d_v @ v
    if b is None:
        raise ValueError("a delta must have a term to be split, got none")
    return b, Delta(factors=factors, dense=dense)


def recompress(delta: Delta) -> Delta:
    """The same matrix at its numerical rank, dense where that is smaller."""
    if delta.factors is None or delta.dense is not None:
        return compact(delta)
    d_out, d_in = delta.factors.b.shape[0], delta.factors.a.shape[1]
    kept, _ = truncate(delta, min(d_out, d_in))
    return compact(Delta(factors=kept))


def bounded(delta: Delta) -> Delta:
    """The same matrix in bounded space: past the break-even rank recompressed if that halves it, else dense."""
    if delta.factors is None:
        return delta
    limit = break_even(delta.factors.b.shape[0], delta.factors.a.shape[1])
    if delta.dense is None and delta.factors.rank < limit:
        return delta
    if delta.dense is None and delta.factors.rank <= RECOMPRESS:
        small = recompress(delta)
        if small.dense is None and (small.factors is None or small.factors.rank <= limit / 2):
            return small
    return Delta(dense=delta.to_dense())


class Accumulator:
    """A streaming sum of w_i s_i B_i A_i: stacked factors, then a dense matrix once that is smaller."""

    def __init__(self, matrix: MatrixSpec) -> None:
        self._limit = break_even(matrix.d_out, matrix.d_in)
        self._terms: list[tuple[Array, Array]] = []
        self._rank = 0
        self._dense: Array | None = None

    def add(self, term: LowRank, weight: float) -> None:
        """Add weight * s B A; b stays as it came, the weight and the scale go into a."""
        self._terms.append((as_float(term.b), as_float(term.a) * (weight * term.scale)))
        self._rank += term.rank
        if self._rank >= (self._limit if self._dense is None else min(self._limit, CHUNK)):
            self._flush()

    def _stack(self, divisor: float) -> tuple[Array, Array]:
        b = np.concatenate([b for b, _ in self._terms], axis=1)
        a = np.concatenate([a for _, a in self._terms], axis=0)
        self._terms, self._rank = [], 0
        if divisor != 1.0:
            a /= divisor
        return b, a

    def _flush(self) -> None:
        b, a = self._stack(1.0)
        product = b @ a
        self._dense = product if self._dense is None else self._dense + product

    def finish(self, divisor: float) -> Delta:
        """The sum over the divisor; the accumulator is empty afterwards."""
        if self._dense is None:
            return Delta(factors=unscaled(*self._stack(divisor))) if self._terms else Delta()
        if self._terms:
            self._flush()
        dense, self._dense = self._dense, None
        return Delta(dense=dense / divisor)


def delta_of(payload: Payload, name: str) -> Delta:
    """One matrix of a payload."""
    return Delta(factors=payload.factors.get(name), dense=payload.dense.get(name))


def payload_of(matrices: Mapping[str, Delta], heads: Mapping[str, Array]) -> Payload:
    """Deltas by module name and head deltas by parameter name as one payload; zero matrices are left out."""
    dense = {name: delta.dense for name, delta in matrices.items() if delta.dense is not None}
    factors = {name: delta.factors for name, delta in matrices.items() if delta.factors is not None}
    return Payload(factors=factors, dense={**dense, **heads})


def _add_matrices(newer: Delta, older: Delta, matrix: MatrixSpec) -> Delta:
    limit = break_even(matrix.d_out, matrix.d_in)
    rank = sum(delta.factors.rank for delta in (newer, older) if delta.factors is not None)
    if rank < limit:
        return plus(newer, older)
    if newer.factors is not None and newer.factors.rank < limit:
        older = Delta(dense=older.to_dense()) if older else older
        return plus(newer, older)
    return Delta(dense=plus(newer, older).to_dense())


def add(newer: Payload, older: Payload, spec: ModelSpec) -> Payload:
    """The sum of two patch payloads, the same on a server and on a device.

    Factors are stacked newest first, unscaled. Where their rank reaches the break-even, what is older turns into a
    dense [d_out, d_in] under the module's name and the newer factors stay beside it, so that the leading rows of A
    are always those of the newest delta; a newer term that is itself past the break-even turns dense too.

    Raises:
        ValueError: for a name that the spec does not know.
    """
    unknown = (newer.factors.keys() | older.factors.keys() | newer.dense.keys() | older.dense.keys()) - (
        spec.matrices.keys() | spec.dense.keys()
    )
    if unknown:
        raise ValueError(f"a patch must name what the model has, got {sorted(unknown)[:3]}")
    matrices = {
        name: _add_matrices(delta_of(newer, name), delta_of(older, name), matrix)
        for name, matrix in spec.matrices.items()
    }
    heads = add_heads(newer.dense, older.dense, spec)
    return replace(payload_of(matrices, heads), coefficients=_add_coefficients(newer.coefficients, older.coefficients))


def _add_coefficients(newer: Coefficients | None, older: Coefficients | None) -> Coefficients | None:
    if newer is None or older is None:
        return newer or older
    return plus_coefficients(newer, older)


def add_heads(newer: Mapping[str, Array], older: Mapping[str, Array], spec: ModelSpec) -> dict[str, Array]:
    """The sums of the dense tensors that are heads, by parameter name."""
    heads: dict[str, Array] = {}
    for name in spec.dense:
        parts = [as_float(dense[name]) for dense in (newer, older) if name in dense]
        if parts:
            heads[name] = sum(parts[1:], parts[0])
    return heads
