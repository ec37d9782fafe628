"""The leading singular values and right vectors of M = B A + D, by the cheapest route that is exact.

- small stacks: thin QR of both stacks, SVD of the core R_b R_a^T [R, R];
- small or dense matrices: their SVD;
- large ones of which few values are wanted: a block Krylov space of M^T M (Golub and Underwood 1977; Musco and Musco
  2015), grown until every wanted residual ||(M^T M) v_i - s_i^2 v_i|| / s_i is below 1e-6 of the largest value:

      Q = orth [G, (M^T M) G, (M^T M)^2 G, ...],    W = M Q,    W^T W = E diag(s^2) E^T,    v_i = Q e_i

  Each step is a few thin products: neither M nor a core is ever decomposed. M^T M squares, so float32 is believed only
  for values above 1e-3 of the largest; else float64 is tried, and at last the plain SVD.

Legend: B [d_out, R], A [R, d_in], D [d_out, d_in]; k values are wanted; rows of q [p, d_in] are a block of Q^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh  # type: ignore[import-untyped]

from fedloom.protocols.messages import Array, LowRank

SMALL = 384  # at or below this size a plain SVD is fast enough for all
BLOCK = 24  # vectors that go through M at a time
BELIEVED = {np.dtype(np.float32): (1e-6, 1e-3), np.dtype(np.float64): (1e-9, 1e-7)}  # residual, smallest value


def leading(factors: LowRank | None, dense: Array | None, k: int) -> tuple[Array, Array]:
    """The k largest singular values (fewer when M is smaller) and their right vectors as rows, [<= k, d_in].

    Values that are rounding may come along with arbitrary vectors, or be left out: the caller cuts at its tolerance.
    """
    matrix = _Sum.of(factors, dense)
    size = matrix.size
    if size > SMALL and 8 * k < size:
        for kind in dict.fromkeys((matrix.dtype, np.dtype(np.float64))):
            found = _krylov(matrix.astype(kind), k, max(size // 2, min(size, 768)), exact=kind != matrix.dtype)
            if found is not None:
                return found[0].astype(matrix.dtype), found[1].astype(matrix.dtype)
    return matrix.svd(k)


@dataclass(frozen=True, kw_only=True)
class _Sum:
    """M = b a + dense, either part may be missing."""

    b: Array | None
    a: Array | None
    dense: Array | None

    @classmethod
    def of(cls, factors: LowRank | None, dense: Array | None) -> _Sum:
        parts = [x for x in (dense, *((factors.b, factors.a) if factors else ())) if x is not None]
        kind = np.result_type(*parts)
        b = a = None
        if factors is not None:
            scale = factors.scale
            b = factors.b.astype(kind, copy=False) if scale == 1.0 else (factors.b * scale).astype(kind, copy=False)
            a = factors.a.astype(kind, copy=False)
        return cls(b=b, a=a, dense=None if dense is None else dense.astype(kind, copy=False))

    @property
    def dtype(self) -> np.dtype[Any]:
        part = self.a if self.dense is None else self.dense
        return np.dtype(np.float32) if part is None else part.dtype

    @property
    def d_in(self) -> int:
        part = self.a if self.dense is None else self.dense
        return 0 if part is None else int(part.shape[1])

    @property
    def size(self) -> int:
        """The largest rank that M can have."""
        if self.dense is not None:
            return int(min(self.dense.shape))
        return 0 if self.b is None or self.a is None else int(min(*self.b.shape, *self.a.shape))

    def astype(self, kind: np.dtype[Any]) -> _Sum:
        b, a, dense = (None if x is None else x.astype(kind, copy=False) for x in (self.b, self.a, self.dense))
        return _Sum(b=b, a=a, dense=dense)

    def forth(self, x: Array) -> Array:
        """Rows x M^T."""
        y = None if self.dense is None else x @ self.dense.T
        if self.b is not None and self.a is not None:
            product = (x @ self.a.T) @ self.b.T
            y = product if y is None else y + product
        return x[:, :0] if y is None else y

    def back(self, y: Array) -> Array:
        """Rows y M."""
        x = None if self.dense is None else y @ self.dense
        if self.b is not None and self.a is not None:
            product = (y @ self.b) @ self.a
            x = product if x is None else x + product
        return y[:, :0] if x is None else x

    def svd(self, k: int) -> tuple[Array, Array]:
        """The plain SVD: through the core for a thin stack, else of the matrix itself."""
        if self.dense is None and self.b is not None and self.a is not None:
            if self.a.shape[0] < min(self.b.shape[0], self.a.shape[1]):
                r_b = np.linalg.qr(self.b, mode="r")
                q_a, r_a = np.linalg.qr(self.a.T)
                _, s, v = np.linalg.svd(r_b @ r_a.T)
                return s[:k], v[:k] @ q_a.T
            matrix: Array = self.b @ self.a
        elif self.dense is not None:
            matrix = self.dense if self.b is None or self.a is None else self.dense + self.b @ self.a
        else:
            raise ValueError("a sum must have a term, got none")
        _, s, v = np.linalg.svd(matrix, full_matrices=False)
        return s[:k], v[:k]


def _krylov(matrix: _Sum, k: int, limit: int, *, exact: bool) -> tuple[Array, Array] | None:
    """Block Krylov; None where `limit` vectors are not enough, or values are too small to be believed.

    `exact`: the input has half these digits, so that values too small for this dtype are rounding there.
    """
    residual, smallest = BELIEVED[matrix.dtype]
    basis = np.empty((limit + BLOCK, matrix.d_in), matrix.dtype)
    image: NDArray[np.float64] | None = None
    gram = np.zeros((limit + BLOCK, limit + BLOCK))
    q = _orth(_start(matrix), basis[:0], 0.0)
    m, check = 0, k + BLOCK
    while True:
        p = len(q)
        basis[m : m + p] = q
        w = matrix.forth(q)
        image = np.empty((limit + BLOCK, w.shape[1])) if image is None else image
        image[m : m + p] = w
        gram[m : m + p, : m + p] = image[m : m + p] @ image[: m + p].T
        gram[: m + p, m : m + p] = gram[m : m + p, : m + p].T
        m += p
        z = matrix.back(w)
        ceiling = float(np.max(np.diagonal(gram)[:m]))
        q = _orth(z, basis[:m], 4 * np.finfo(matrix.dtype).eps * ceiling)
        if m >= check or not len(q) or m >= limit:
            lam, e = eigh(gram[:m, :m], subset_by_index=[max(m - k, 0), m - 1], check_finite=False)
            s, e = np.sqrt(np.maximum(lam[::-1], 0.0)), e[:, ::-1]
            left = np.linalg.norm((z @ q.T).T @ e[m - p : m], axis=0) if len(q) else np.zeros(len(s))
            if np.all(left <= residual * s[0] * np.maximum(s, smallest * s[0])):
                believed = exact or s[-1] >= smallest * s[0]
                return (s.astype(matrix.dtype), e.T.astype(matrix.dtype) @ basis[:m]) if believed else None
            if m >= limit or not len(q):
                return None
            check = m + max(2 * BLOCK, m // 5)


def _start(matrix: _Sum) -> Array:
    """A fixed Gaussian block, [BLOCK, d_in]."""
    rng = np.random.Generator(np.random.Philox(key=0))
    return rng.standard_normal((BLOCK, matrix.d_in)).astype(matrix.dtype)


def _orth(x: Array, basis: Array, floor: float) -> Array:
    """Orthonormal rows that span what x [p, n] adds to a basis; directions shorter than `floor` are dropped."""
    for _ in range(2):
        x = x - (x @ basis.T) @ basis
        if not len(x):
            break
        x64 = x.astype(np.float64)
        w, e = np.linalg.eigh(x64 @ x64.T)
        keep = w > max(floor**2, 1e-12 * w[-1])
        x = (e[:, keep] / np.sqrt(w[keep])).T.astype(x.dtype) @ x
        floor = 0.0
    return x
