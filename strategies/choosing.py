"""Which units to prune: the least important of each kind.

Attention heads and channels are ranked apart, each over all layers that are not spared; whole key-value heads go, so
every one that stays has as many query heads as before. A group keeps a unit, and what is pruned stays pruned unless it
may regrow.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.validate import check_keep
from fedloom.strategies.masked import Bits, Keep
from fedloom.strategies.sparsity import removed, spared_layers

Scores = Mapping[str, NDArray[np.float64]]
"""[units] by group: the larger, the more a unit matters."""


class GroupKind(StrEnum):
    """What a group's units are."""

    ATTENTION = "attention"  # key-value heads with their query heads
    FFN = "ffn"  # channels between two layers of a feed-forward network


class Placed(Protocol):
    """Where a group is."""

    @property
    def kind(self) -> GroupKind: ...

    @property
    def layer(self) -> int: ...


class Units(Protocol):
    """What of a model can be pruned: its layers, where each group is, and how many units each has."""

    @property
    def layers(self) -> int: ...

    @property
    def groups(self) -> Mapping[str, Placed]: ...

    @property
    def units(self) -> Mapping[str, int]: ...


def whole(keep: Keep, units: Mapping[str, int]) -> dict[str, Bits]:
    """A keep with every group named."""
    return {name: keep[name] if name in keep else np.ones(count, np.bool_) for name, count in units.items()}


def gone(structure: Units, keep: Keep) -> dict[GroupKind, int]:
    """How many units of each kind a keep drops."""
    dropped = dict.fromkeys(GroupKind, 0)
    for name, bits in keep.items():
        dropped[structure.groups[name].kind] += int((~bits).sum())
    return dropped


def wanted(structure: Units, ratio: float) -> dict[GroupKind, int]:
    """How many units of each kind a ratio prunes."""
    totals = dict.fromkeys(GroupKind, 0)
    for name, count in structure.units.items():
        totals[structure.groups[name].kind] += count
    return {kind: removed(ratio, total) for kind, total in totals.items()}


def choose_keep(
    structure: Units,
    scores: Scores,
    ratio: float,
    *,
    keep: Keep | None = None,
    spared: set[int] | None = None,
    regrow: bool = False,
) -> dict[str, Bits]:
    """The keep that prunes a share of all units of each kind (rounded down), the least important first.

    Args:
        scores: by group; needed for the groups of layers that are not spared.
        ratio: in [0, 1), of the units of the whole model, those of spared layers among them.
        keep: what the model keeps now; more than the ratio is never given back, but with `regrow`.
        spared: layers to leave alone; None spares the first tenth and the last.
        regrow: choose afresh, whatever was pruned.

    Raises:
        ValueError: for a ratio outside its bounds or beyond what may be pruned, missing or infinite scores, or a keep
            that does not fit.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"a pruning ratio must be in [0, 1), got {ratio}")
    check_keep("keep", keep or {}, structure.units)
    before = whole({} if regrow else keep or {}, structure.units)
    return drop_least(structure, scores, wanted(structure, ratio), keep=before, spared=spared)


def drop_least(
    structure: Units, scores: Scores, counts: Mapping[GroupKind, int], *, keep: Keep, spared: set[int] | None = None
) -> dict[str, Bits]:
    """The keep without the least important, until so many units of each kind are gone; what is gone stays so.

    Raises:
        ValueError: for more than may be pruned, or missing or infinite scores.
    """
    left_alone = spared_layers(structure.layers) if spared is None else spared
    chosen = {name: bits.copy() for name, bits in keep.items()}
    before = gone(structure, chosen)
    for kind, count in counts.items():
        names = [name for name, group in structure.groups.items() if group.kind is kind]
        free = [name for name in names if structure.groups[name].layer not in left_alone]
        total = sum(structure.units[name] for name in names)
        most = sum(structure.units[name] - 1 for name in free)
        if count > max(most, before[kind]):
            raise ValueError(f"{kind} can be pruned by {most / total:.3f} at most, got a share of {count / total:.3f}")
        _remove(chosen, free, scores, count - before[kind])
    return chosen


def _remove(chosen: dict[str, Bits], free: list[str], scores: Scores, count: int) -> None:
    """Remove the `count` units of the smallest scores, in place; ties go by the order of groups and units."""
    candidates = []
    for place, name in enumerate(free):
        if name not in scores or len(scores[name]) != len(chosen[name]) or not np.isfinite(scores[name]).all():
            raise ValueError(f"every group to prune must have {len(chosen[name])} finite scores, {name} has not")
        candidates += [(float(scores[name][unit]), place, int(unit)) for unit in np.flatnonzero(chosen[name])]
    for _, place, unit in sorted(candidates):
        if count <= 0:
            return
        bits = chosen[free[place]]
        if bits.sum() > 1:
            bits[unit] = False
            count -= 1
