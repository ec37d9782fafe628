"""Which units a fleet does without: the importances that its devices measured, put together into one order.

    S_t = (1 - s) S_{t-1} + s sum_i p_i s_i,t / sum_i p_i       over the devices i that keep the unit, p_i by examples

Devices that prune by one order have nested models: what one trains is in all that keep as much. Units that went first
stay first: their scores are old, those of the units that stay go on. Ours; FedSpine's devices each choose alone, and
then hardly two of them train the same model.

Legend: a unit is a key-value head with its queries or an FFN channel; groups as in ModelSpec.groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import Array, ModelSpec, Payload
from fedloom.strategies.choosing import GroupKind, Scores, choose_keep, drop_least, gone, wanted, whole
from fedloom.strategies.masked import Bits, Keep

UNIT_SCORES: Final = "unit_scores"  # the knob that asks a device for the importance of its units
SCORES: Final = "units/"  # before a group's name, among an update's dense tensors
SMOOTHING: Final = 0.5  # s
_KINDS: Final = {
    "attention": GroupKind.ATTENTION, "mixed": GroupKind.ATTENTION, "mlp": GroupKind.FFN, "channels": GroupKind.FFN,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a group is."""

    kind: GroupKind
    layer: int


@dataclass(frozen=True, kw_only=True)
class FleetUnits:
    """What a server knows of a model's units: those of a ModelSpec."""

    layers: int
    groups: Mapping[str, Place]
    units: Mapping[str, int]


def units_of(spec: ModelSpec) -> FleetUnits:
    """Each group's place, off the adapted matrices that it cuts.

    Raises:
        ValueError: for a model without shapes, or a group that cuts no adapted matrix.
    """
    if spec.shapes is None:
        raise ValueError("a model must have shapes for its units to be placed, got none")
    groups = {}
    for name, matrix in spec.matrices.items():
        linear = spec.shapes.linears[name]
        for axis in (matrix.rows, matrix.columns):
            if axis is not None and linear.reads in _KINDS:
                groups[axis.group] = Place(kind=_KINDS[linear.reads], layer=linear.block)
    if missing := sorted(spec.groups.keys() - groups.keys()):
        raise ValueError(f"a group to prune must have an adapted module, {missing[0]} has none")
    return FleetUnits(layers=len(spec.shapes.blocks), groups=groups, units=spec.groups)


def split(payload: Payload) -> tuple[Payload, dict[str, Array]]:
    """A payload without the scores among its dense tensors, and the scores by group."""
    scores = {name.removeprefix(SCORES): value for name, value in payload.dense.items() if name.startswith(SCORES)}
    if not scores:
        return payload, {}
    dense = {name: value for name, value in payload.dense.items() if not name.startswith(SCORES)}
    return Payload(factors=payload.factors, dense=dense, keep=payload.keep), scores


def check_scores(who: str, scores: Mapping[str, Array], groups: Mapping[str, int]) -> None:
    """Raise ValueError unless there is a finite score, not negative, for each unit of each group."""
    if scores.keys() != groups.keys():
        raise ValueError(
            f"{who} must score the units of each group, got a difference in {sorted(scores.keys() ^ groups.keys())[:3]}"
        )
    for name, value in scores.items():
        if value.dtype.kind != "f" or value.shape != (groups[name],):
            raise ValueError(f"{who} must score {groups[name]} units of {name}, got {value.dtype} {value.shape}")
        if not (np.isfinite(value).all() and (value >= 0).all()):
            raise ValueError(f"{who} must have finite scores >= 0 for {name}, got others")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one device found: its scores by group, what it keeps, and its weight."""

    scores: Mapping[str, Array]
    keep: Keep
    weight: float


@dataclass(frozen=True, kw_only=True)
class UnitOrder:
    """Scores by group (none: nothing is known yet), and the place in the order in which units went; 0: it stays."""

    scores: Scores = field(default_factory=dict)
    went: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.scores)

    def keep(self, units: FleetUnits, ratio: float, allowed: Keep) -> dict[str, Bits]:
        """What a device keeps at a ratio, of what it may keep: the least important of it go, the first that went first.

        Raises:
            ValueError: before anything was learned, or for a ratio beyond what may be pruned.
        """
        return choose_keep(units, self._keys(), ratio, keep=allowed)

    def advanced(self, units: FleetUnits, keeps: Iterable[Keep], most: float) -> UnitOrder:
        """The order, gone as far as the most pruned of these keeps, but no further than a ratio.

        As it was where nothing is known. A device that dropped more than anyone was asked to is its own affair.
        """
        if not self:
            return self
        so_far = {name: at == 0 for name, at in self.went.items()}
        dropped = [gone(units, keep) for keep in (so_far, *keeps)]
        counts = {kind: min(limit, max(one[kind] for one in dropped)) for kind, limit in wanted(units, most).items()}
        after = drop_least(units, self._keys(), counts, keep=so_far)
        new = sorted(
            (float(self.scores[name][unit]), name, int(unit))
            for name in units.units
            for unit in np.flatnonzero(so_far[name] & ~after[name])
        )
        went = {name: at.copy() for name, at in self.went.items()}
        first = 1 + max((int(at.max()) for at in went.values()), default=0)
        for place, (_, name, unit) in enumerate(new, start=first):
            went[name][unit] = place
        return UnitOrder(scores=self.scores, went=went)

    def learned(self, units: FleetUnits, found: Iterable[Measured]) -> UnitOrder:
        """The scores with a round's in them; a unit that nobody kept has the score it had.

        One whose score nobody knows is as important as the mean of its group.
        """
        sums = {name: np.zeros((2, count)) for name, count in units.units.items()}
        for one in found:
            for name, bits in whole(one.keep, units.units).items():
                sums[name][0] += one.weight * bits * one.scores[name].astype(np.float64)
                sums[name][1] += one.weight * bits
        if not any(total[1].any() for total in sums.values()):
            return self
        scores = {}
        for name, (total, weight) in sums.items():
            covered = weight > 0
            now = np.divide(total, weight, out=np.zeros_like(total), where=covered)
            fallback = now[covered].mean() if covered.any() else 0.0
            before = self.scores.get(name)
            mixed = now if before is None else (1 - SMOOTHING) * before + SMOOTHING * now
            scores[name] = np.where(covered, mixed, fallback if before is None else before)
        went = self.went or {name: np.zeros(count, np.int64) for name, count in units.units.items()}
        return UnitOrder(scores=scores, went=went)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays, for a checkpoint."""
        scores = {f"scores/{name}": np.asarray(value, np.float64) for name, value in self.scores.items()}
        return {**scores, **{f"went/{name}": value for name, value in self.went.items()}}

    @classmethod
    def restore(cls, tensors: Mapping[str, NDArray[Any]]) -> UnitOrder:
        """The order that `tensors` came from."""
        of = {
            part: {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
            for part in ("scores/", "went/")
        }
        return cls(scores=of["scores/"], went=of["went/"])

    def _keys(self) -> Scores:
        """What units are ranked by: those that went lie below all scores, in their order."""
        if not self:
            raise ValueError("an order of units must have scores, got none")
        return {
            name: np.where(self.went[name] > 0, self.went[name] - float(2**53), value)
            for name, value in self.scores.items()
        }
