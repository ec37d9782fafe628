"""The leading singular values and right vectors of M = B A + D, by the cheapest route that is exact.

- small stacks: thin QR of both stacks, SVD of the core R_b R_a^T [R, R];
- tall float32 stacks: Gram matrices in float64, B^T B and A A^T = L L^T; the eigenvectors w of C = L^T (B^T B) L give
  the left vectors U = B L w / sigma; then one exact pass back, V from the QR of M^T U;
- dense, or stacks no thinner than the matrix: the same on M itself, or a dense SVD where M is small.

Squaring costs half the digits of float64, which leaves as many as float32 has: float64 input never takes it.

Legend: B [d_out, R], A [R, d_in], D [d_out, d_in]; k singular values are wanted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas, eigh, lapack

from fedloom.protocols.messages import Array, LowRank

SMALL = 512  # below this size a plain SVD is fast enough for all
Double = NDArray[np.float64]


def leading(factors: LowRank | None, dense: Array | None, k: int) -> tuple[Array, Array]:
    """The k largest singular values (fewer when M is smaller) and their right vectors as rows, [<= k, d_in].

    Values that are rounding may come along with arbitrary vectors: the caller cuts at its tolerance.
    """
    if factors is not None and dense is None and factors.rank < min(factors.b.shape[0], factors.a.shape[1]):
        b, a = factors.b, factors.a
        if b.dtype != a.dtype:
            kind = np.result_type(b, a)
            b, a = b.astype(kind), a.astype(kind)
        if factors.rank <= SMALL or b.dtype == np.float64 or 4 * k >= factors.rank:
            s, v = _core(b, a, k)
        else:
            s, v = _gram(b, a, k)
        return s * abs(factors.scale), v
    matrix = dense if dense is not None else np.zeros((), np.float32)
    if factors is not None:
        matrix = factors.dense() + matrix if dense is not None else factors.dense()
    if min(matrix.shape) <= SMALL or matrix.dtype == np.float64 or 4 * k >= min(matrix.shape):
        _, s, v = np.linalg.svd(matrix, full_matrices=False)
        return s[:k], v[:k]
    return _gram_dense(matrix, k)


def _core(b: Array, a: Array, k: int) -> tuple[Array, Array]:
    """QR, QR and the SVD of the core."""
    r_b = np.linalg.qr(b, mode="r")
    q_a, r_a = np.linalg.qr(a.T)
    _, s, v = np.linalg.svd(r_b @ r_a.T)
    return s[:k], v[:k] @ q_a.T


def _gram(b: Array, a: Array, k: int) -> tuple[Array, Array]:
    """Cholesky of one Gram matrix, top eigenvectors of the core, one pass back through M."""
    b64, a64 = b.astype(np.float64), a.astype(np.float64)
    factor = _cholesky(a64 @ a64.T)
    core = blas.dtrmm(1.0, factor, blas.dtrmm(1.0, factor, b64.T @ b64, side=1, lower=1), trans_a=1, lower=1)
    w = _top(core, k)
    u = b64 @ (factor @ w)
    u /= np.maximum(np.linalg.norm(u, axis=0), np.finfo(np.float64).tiny)
    return _back((u.T @ b64) @ a64, a.dtype)


def _gram_dense(matrix: Array, k: int) -> tuple[Array, Array]:
    m64 = matrix.astype(np.float64)
    if m64.shape[0] > m64.shape[1]:
        u = m64 @ _top(m64.T @ m64, k)
        u /= np.maximum(np.linalg.norm(u, axis=0), np.finfo(np.float64).tiny)
    else:
        u = _top(m64 @ m64.T, k)
    return _back(u.T @ m64, matrix.dtype)


def _cholesky(gram: Double) -> Double:
    """Lower L with L L^T = gram, with a jitter of float64 rounding where gram is singular."""
    jitter = 0.0
    scale = float(np.trace(gram)) or 1.0
    while True:
        factor, info = lapack.dpotrf(gram + jitter * scale * np.eye(len(gram)), lower=1, clean=1)
        if info == 0:
            return np.asarray(factor)
        jitter = 100 * jitter or 1e-15


def _top(core: Double, k: int) -> Double:
    """The eigenvectors of the k largest eigenvalues, strongest first, [n, k]."""
    n = len(core)
    _, w = eigh(core, subset_by_index=[max(n - k, 0), n - 1], driver="evr", overwrite_a=True, check_finite=False)
    return np.ascontiguousarray(w[:, ::-1])


def _back(z: Double, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Singular values and right vectors of Z = U^T M [k, d_in], for orthonormal U that spans the leading left space."""
    q, r = np.linalg.qr(z.T)
    _, s, v = np.linalg.svd(r.T)
    return s.astype(dtype), (v @ q.T).astype(dtype)
