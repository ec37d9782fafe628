"""The global model as K whole numbers: what every device's coefficients are, and how a late one gets there.

    c_v = delta_1 + ... + delta_v
    u_t = step_t + r_{t-1},    delta_t = 2^{e_t} round(u_t / 2^{e_t}),    r_t = u_t - delta_t

A round's step is rounded to whole multiples of a power of two before anybody applies it; what was cut is kept on the
server and added next time (error feedback, Seide et al. 2014), so nothing is lost for good. Sums of such numbers are
exact: however a device reached version v, round by round or at once, it holds the same bits.

Legend: c, u, r, step [K]; e_t = floor(log2 rms(u_t)) - bits, the rms over what is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import Array, Coefficients, Patch, Payload, Scope, Subspace

Vector = NDArray[np.float64]
EXACT = 2**53  # whole numbers below it are exact in float64
LEAST_EXPONENT = -300
WINDOW = 64  # rounds that a device may miss and still be sent a change


def plus(newer: Coefficients, older: Coefficients) -> Coefficients:
    """The exact sum, at the smaller exponent.

    Raises:
        ValueError: for coefficients of two subspaces, or a sum that needs more than 53 bits.
    """
    if newer.subspace != older.subspace:
        raise ValueError(f"coefficients must be of one subspace, got {newer.subspace} and {older.subspace}")
    exponent = min(newer.exponent, older.exponent)
    total = np.zeros(newer.subspace.k, np.int64)
    for term in (newer, older):
        shift = term.exponent - exponent
        largest = int(np.abs(term.steps).max(initial=0))
        if largest and (shift >= 53 or largest << shift >= EXACT // 2):
            raise ValueError(f"coefficients must fit 53 bits, got {largest} x 2^{shift} more")
        total += term.steps << min(shift, 52)
    return Coefficients(subspace=newer.subspace, exponent=exponent, steps=total)


def minus(newer: Coefficients, older: Coefficients) -> Coefficients:
    """The exact difference."""
    return plus(newer, Coefficients(subspace=older.subspace, exponent=older.exponent, steps=-older.steps))


def reduced(c: Coefficients) -> Coefficients:
    """The same numbers at the largest exponent that holds them, so that they travel in few bits."""
    together = int(np.bitwise_or.reduce(np.abs(c.steps))) if c.steps.size else 0
    if not together:
        return Coefficients(subspace=c.subspace, exponent=0, steps=c.steps)
    shift = (together & -together).bit_length() - 1
    return Coefficients(subspace=c.subspace, exponent=c.exponent + shift, steps=c.steps >> shift)


def zero(subspace: Subspace) -> Coefficients:
    """The base itself."""
    return Coefficients(subspace=subspace, exponent=0, steps=np.zeros(subspace.k, np.int64))


def rounded(step: Vector, subspace: Subspace, bits: int, total: Coefficients) -> tuple[Coefficients, Vector]:
    """The nearest coefficients to a step, and what they leave.

    Args:
        bits: how many bits below the step's root mean square are kept.
        total: what the result will be added to; together they must fit 53 bits, which bounds the exponent from below.

    Raises:
        ValueError: for a step that is not finite.
    """
    if not np.isfinite(step).all():
        raise ValueError("a step must be finite, got NaN or infinity")
    moving = step[step != 0]
    if not moving.size:
        return zero(subspace), np.zeros_like(step)
    rms = math.sqrt(float(np.mean(np.square(moving))))
    exponent = max(math.floor(math.log2(rms)) - bits, LEAST_EXPONENT) if rms else LEAST_EXPONENT
    room = float(np.abs(total.values()).max(initial=0.0) + np.abs(step).max())
    exponent = max(exponent, math.ceil(math.log2(room)) - 50 if room else exponent)
    steps = np.rint(np.ldexp(step, -exponent)).astype(np.int64)
    kept = Coefficients(subspace=subspace, exponent=exponent, steps=steps)
    return kept, step - kept.values()


@dataclass(frozen=True, kw_only=True)
class CoefficientLog:
    """The coefficients at `version`, the last changes, newest first, and what rounding has cut so far."""

    base_hash: str
    version: int
    total: Coefficients
    residual: Vector
    recent: tuple[Coefficients, ...] = ()

    def push(self, step: Vector, bits: int, *, error_feedback: bool = True) -> CoefficientLog:
        """The log after one more round."""
        wanted = step + self.residual if error_feedback else step
        delta, left = rounded(wanted, self.total.subspace, bits, self.total)
        return CoefficientLog(
            base_hash=self.base_hash,
            version=self.version + 1,
            total=reduced(plus(delta, self.total)),
            residual=left if error_feedback else np.zeros_like(left),
            recent=(delta, *self.recent)[:WINDOW],
        )

    def since(self, version: int) -> Patch | None:
        """What takes a device from `version` to the newest: K whole numbers, whatever it missed; None at version 0.

        Raises:
            ValueError: for a negative version.
        """
        if version < 0:
            raise ValueError(f"a device's version must be >= 0, got {version}")
        if self.version == 0:
            return None
        missed = self.version - version
        payload, start = Payload(coefficients=self.total), 0
        if missed == 0:
            payload, start = Payload(), version
        elif version and 0 < missed <= len(self.recent):
            change = self.recent[missed - 1]
            for newer in reversed(self.recent[: missed - 1]):
                change = plus(newer, change)
            payload, start = Payload(coefficients=reduced(change)), version
        return Patch(base_hash=self.base_hash, since=start, version=self.version, payload=payload)

    def tensors(self) -> dict[str, Array]:
        """The log's tensors, for a State."""
        tensors: dict[str, Array] = {"log/residual": self.residual, "log/total": _floats(self.total)}
        return tensors | {f"log/recent/{i}": _floats(delta) for i, delta in enumerate(self.recent)}

    def meta(self) -> dict[str, Any]:
        """What `read_log` must know beside the tensors."""
        exponents = [self.total.exponent, *(delta.exponent for delta in self.recent)]
        return {"base_hash": self.base_hash, "subspace": asdict(self.total.subspace), "exponents": exponents}


def first_log(base_hash: str, subspace: Subspace) -> CoefficientLog:
    """The log before the first round."""
    return CoefficientLog(base_hash=base_hash, version=0, total=zero(subspace), residual=np.zeros(subspace.k))


def read_log(version: int, tensors: Mapping[str, Array], meta: Mapping[str, Any]) -> CoefficientLog:
    """The log that `tensors` and `meta` wrote."""
    subspace = subspace_from(meta["subspace"])
    kept = [
        Coefficients(subspace=subspace, exponent=exponent, steps=tensors[name].astype(np.int64))
        for exponent, name in zip(
            meta["exponents"],
            ["log/total", *(f"log/recent/{i}" for i in range(len(meta["exponents"]) - 1))],
            strict=True,
        )
    ]
    return CoefficientLog(
        base_hash=meta["base_hash"],
        version=version,
        total=kept[0],
        residual=tensors["log/residual"].astype(np.float64),
        recent=tuple(kept[1:]),
    )


def subspace_from(table: Mapping[str, Any]) -> Subspace:
    """The subspace that `asdict` made a table of."""
    return Subspace(**{**table, "scope": Scope(table["scope"])})


def _floats(c: Coefficients) -> Vector:
    """Whole numbers as float64, which holds them exactly, so that one kind of tensor serves every state."""
    return c.steps.astype(np.float64)
