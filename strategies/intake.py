"""What a strategy takes in: updates held against the model's spec, weighted, and kept within a norm.

    theta' = theta + c (theta_k - theta),    c = the largest in [0, 1] with ||change of all s B A and heads||_F <= clip

For a change of factors, s((B + c dB)(A + c dA) - B A) = c X + c^2 Y with X = s(dB A + B dA) and Y = s dB dA, so c is
the first positive root of c^4 <Y,Y> + 2 c^3 <X,Y> + c^2 <X,X> = clip^2. All norms are of products, never of a factor
alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from fedloom.protocols.messages import Array, LowRank, ModelSpec, Payload, Update, unscaled
from fedloom.protocols.validate import check_keep
from fedloom.strategies.lowrank import Delta, as_float, inner, payload_norm
from fedloom.strategies.masked import MaskedAccumulator, pruned
from fedloom.strategies.unit_order import check_scores, split


def check_update(
    update: Update, spec: ModelSpec, *, shared_a: bool = False, masked: bool = False, partial: bool = False
) -> None:
    """Hold an update against the model.

    Args:
        update: what a device answered.
        spec: the model that the state is for.
        shared_a: A travels as [r, 0], since both sides know it (FFA-LoRA).
        masked: it may come from a pruned model, its shapes those of its keep.
        partial: it may leave out modules, though not all of them.

    Raises:
        ValueError: for an unknown or missing module or head, a keep that is not of the model's groups or not allowed, a
            wrong shape, an impossible rank, an alpha that is not positive, or a value that is not finite.
    """
    who, payload = f"update of {update.device}", update.payload
    if update.examples < 0:
        raise ValueError(f"{who} must count examples >= 0, got {update.examples}")
    if masked:
        payload, scores = split(payload)
        if scores:
            check_scores(who, scores, spec.groups)
    _check_names(who, payload, spec, partial)
    if payload.keep and not masked:
        raise ValueError(f"{who} must be of the whole model, got one pruned in {sorted(payload.keep)[:3]}")
    check_keep(f"keep of {who}", payload.keep, spec.groups)
    kept = pruned(spec, payload.keep) if payload.keep else spec
    for name, term in payload.factors.items():
        d_out, d_in = kept.matrices[name].d_out, kept.matrices[name].d_in
        columns = 0 if shared_a else d_in
        if term.b.shape[0] != d_out or term.a.shape[1] != columns:
            raise ValueError(
                f"{who} must have b [{d_out}, r] and a [r, {columns}] for {name}, got {term.b.shape} and {term.a.shape}"
            )
        most = min(spec.matrices[name].d_out, spec.matrices[name].d_in)  # a pruned one keeps the rank it was asked for
        if term.rank > most:
            raise ValueError(f"{who} must have a rank <= {most} for {name}, got {term.rank}")
        if not (math.isfinite(term.alpha) and term.alpha > 0):
            raise ValueError(f"{who} must have a finite alpha > 0 for {name}, got {term.alpha}")
        _check_values(who, name, term.b, term.a)
    for name, value in payload.dense.items():
        if value.shape != spec.dense[name]:
            raise ValueError(f"{who} must have shape {spec.dense[name]} for {name}, got {value.shape}")
        _check_values(who, name, value)


def _check_names(who: str, payload: Payload, spec: ModelSpec, partial: bool) -> None:
    modules, heads = set(payload.factors), set(payload.dense)
    for kind, got, wanted in (
        ("adapted module", modules, set(spec.matrices) & modules if partial else set(spec.matrices)),
        ("trained head", heads, set(spec.dense)),
    ):
        if got != wanted:
            raise ValueError(f"{who} must carry each {kind} once, got a difference in {sorted(got ^ wanted)[:3]}")
    if spec.matrices and not modules:
        raise ValueError(f"{who} must carry an adapted module, got none")


def _check_values(who: str, name: str, *arrays: Array) -> None:
    for array in arrays:
        if array.dtype.kind != "f":
            raise ValueError(f"{who} must carry real floats for {name}, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{who} must be finite for {name}, got NaN or infinity")


def taken(
    updates: Iterable[Update], spec: ModelSpec, *, shared_a: bool = False, masked: bool = False, partial: bool = False
) -> Iterator[Update]:
    """The updates one by one, each checked, without those of no examples.

    Raises:
        ValueError: for an update that contradicts the spec, or after the last when none carried an example.
    """
    count = 0
    for update in updates:
        check_update(update, spec, shared_a=shared_a, masked=masked, partial=partial)
        if update.examples:
            count += 1
            yield update
    if not count:
        raise ValueError("a round must have an update with at least one example, got none")


def clip_share(payload: Payload, clip_norm: float) -> float:
    """What to multiply a delta by so that its norm is at most clip_norm; 1 where clip_norm is 0."""
    norm = payload_norm(payload) if clip_norm else 0.0
    return clip_norm / norm if norm > clip_norm else 1.0


def move_share(given: Payload, update: Payload, clip_norm: float) -> float:
    """How far to go from the given factors to the update's, 0..1, for a change of products of norm <= clip_norm.

    The update's dense tensors are deltas already and count as part of the change.
    """
    if not clip_norm:
        return 1.0
    xx, xy, yy = payload_norm(Payload(dense=update.dense)) ** 2, 0.0, 0.0
    for name, term in update.factors.items():
        old = _rescaled(given.factors[name], term)
        d_b, d_a = as_float(term.b) - old.b, as_float(term.a) - old.a
        x = unscaled(np.concatenate([d_b, old.b], axis=1), np.concatenate([old.a, d_a], axis=0))
        y = unscaled(d_b, d_a)
        square = term.scale**2
        xx += square * inner(x, x)
        xy += square * inner(x, y)
        yy += square * inner(y, y)
    roots = np.roots(np.array([yy, 2 * xy, xx, 0.0, -(clip_norm**2)]) / clip_norm**2)
    return min((float(c.real) for c in roots if abs(c.imag) < 1e-9 and 0 < c.real < 1), default=1.0)


def moved(old: LowRank, new: LowRank, c: float) -> LowRank:
    """The factors a share c of the way from old to new, with new's alpha."""
    if c == 1.0:
        return new
    old = _rescaled(old, new)
    b, a = old.b + c * (as_float(new.b) - old.b), old.a + c * (as_float(new.a) - old.a)
    return LowRank(b=b, a=a, alpha=new.alpha, rslora=new.rslora)


def _rescaled(old: LowRank, new: LowRank) -> LowRank:
    """The product of old under new's alpha, which goes into b."""
    if old.scale == new.scale:
        return old
    return LowRank(b=old.b * (old.scale / new.scale), a=old.a, alpha=new.alpha, rslora=new.rslora)


def check_equal(update: Update, given: Payload) -> None:
    """Raise ValueError unless each factor has the rank and the alpha of the one that was given."""
    for name, term in update.payload.factors.items():
        old = given.factors[name]
        if (term.rank, term.alpha, term.rslora) != (old.rank, old.alpha, old.rslora):
            raise ValueError(
                f"update of {update.device} must have rank {old.rank} and alpha {old.alpha:g} for {name} as all have, "
                f"got rank {term.rank} and alpha {term.alpha:g}"
            )


class TensorSum:
    """A streaming weighted sum of named tensors."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}

    def add(self, tensors: Mapping[str, Array], weight: float) -> None:
        for name, value in tensors.items():
            term = as_float(value) * weight
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def finish(self, divisor: float) -> dict[str, Array]:
        return {name: value / divisor for name, value in self._sums.items()}


class ProductSum:
    """The exact streaming mean of products: dW = sum_k p_k s_k B_k A_k for each module, and the heads' mean.

    p_k is over the updates that have the module and, of a pruned one, over those that keep the row or column.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._matrices = {name: MaskedAccumulator(matrix) for name, matrix in spec.matrices.items()}
        self._heads = TensorSum()
        self._weight = 0.0

    def add(self, payload: Payload, weight: float, share: float = 1.0) -> None:
        """One update of this weight, multiplied by `share`."""
        for name, term in payload.factors.items():
            self._matrices[name].add(term, weight, payload.keep, share)
        self._heads.add(payload.dense, weight * share)
        self._weight += weight

    def add_term(self, name: str, term: LowRank, weight: float) -> None:
        """One more term of a module that does not count as an update."""
        self._matrices[name].add_term(term, weight)

    def matrices(self) -> Iterator[tuple[str, Delta]]:
        """Each module's mean, once: what is handed out is let go."""
        for name, matrix in self._matrices.items():
            yield name, matrix.finish()

    def heads(self) -> dict[str, Array]:
        """The heads' mean."""
        return self._heads.finish(self._weight)


def product_sum(updates: Iterable[Update], spec: ModelSpec, clip_norm: float, *, partial: bool = False) -> ProductSum:
    """dW of all updates, pruned ones too, each clipped in its product norm; some without some modules, if `partial`."""
    total = ProductSum(spec)
    for update in taken(updates, spec, masked=True, partial=partial):
        total.add(update.payload, float(update.examples), clip_share(update.payload, clip_norm))
    return total
