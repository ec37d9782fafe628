"""Which units to prune: the least important of each kind.

Attention heads and channels are ranked apart, each over all layers that are not spared; whole key-value heads go, so
every one that stays has as many query heads as before. A group keeps a unit, and what is pruned stays pruned unless it
may regrow.
"""

from __future__ import annotations

import numpy as np

from fedloom.client.pruning.importance import Scores
from fedloom.client.pruning.structure import GroupKind, Structure, whole
from fedloom.protocols.validate import check_keep
from fedloom.strategies.masked import Bits, Keep
from fedloom.strategies.sparsity import removed, spared_layers


def choose_keep(
    structure: Structure,
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
    left_alone = spared_layers(structure.layers) if spared is None else spared
    chosen = {name: bits.copy() for name, bits in whole({} if regrow else keep or {}, structure.units).items()}
    for kind in GroupKind:
        names = [name for name, group in structure.groups.items() if group.kind is kind]
        free = [name for name in names if structure.groups[name].layer not in left_alone]
        total = sum(structure.units[name] for name in names)
        most = sum(structure.units[name] - 1 for name in free)
        gone = sum(int((~chosen[name]).sum()) for name in names)
        wanted = removed(ratio, total)
        if wanted > max(most, gone):
            raise ValueError(f"{kind} can be pruned by {most / total:.3f} at most, got a ratio of {ratio}")
        _remove(chosen, free, scores, wanted - gone)
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
