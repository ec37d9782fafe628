"""How much of a model is pruned, and what shapes are left: the arithmetic that a server and its devices must share.

    v_t = v_f + (v_0 - v_f) (1 - t / T)^3       the pruned share after t of T steps (Zhu and Gupta 2017)

A ratio is a share of all units of a kind (key-value heads, FFN channels), those of spared layers among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.shapes import Block, Linear, Shapes
from fedloom.strategies.masked import Keep

SPARED_FIRST, SPARED_LAST = 0.1, 1  # share of the first layers, and number of last ones


def cubic(step: int, steps: int, final: float, start: float = 0.0) -> float:
    """The pruned share after `step` of `steps`: fast at first, slow towards `final`.

    Raises:
        ValueError: for no steps, or shares outside 0 to 1.
    """
    if steps < 1 or not 0 <= start < 1 or not 0 <= final < 1:
        raise ValueError(f"a schedule must have steps and shares in [0, 1), got {steps} steps, {start} to {final}")
    left = 1 - min(max(step, 0), steps) / steps
    return final + (start - final) * left**3


def spared_layers(layers: int, first: float = SPARED_FIRST, last: int = SPARED_LAST) -> set[int]:
    """The layers that are never pruned: the first ones (rounded down) and the last."""
    return {*range(int(first * layers)), *range(layers - last, layers)}


def removed(ratio: float, units: int) -> int:
    """How many of a kind's units a ratio prunes, rounded down."""
    return int(ratio * units + 1e-9)


def pruned_share(keep: Keep, units: Mapping[str, int]) -> float:
    """The share of all units that a keep drops; a group that it does not name is whole."""
    total = sum(units.values())
    return sum(int((~bits).sum()) for bits in keep.values()) / total if total else 0.0


def narrowed(shapes: Shapes, ratio: float) -> Shapes:
    """The shapes at a pruning ratio, the same share gone from every layer that is not spared.

    Which layers lose more is known only once a device has chosen. Where all layers are alike, sums over them do not
    depend on it, and the widest layer is a spared one: so memory and operations are those of any choice.

    Raises:
        ValueError: for a ratio beyond what the layers that are not spared can give.
    """
    spared = spared_layers(len(shapes.blocks))
    free = [at for at in range(len(shapes.blocks)) if at not in spared]
    heads = _spread([block.kv_heads for block in shapes.blocks], free, ratio)
    channels = _spread([block.ffn for block in shapes.blocks], free, ratio)
    blocks = tuple(
        replace(block, heads=block.heads // block.kv_heads * kv, kv_heads=kv, ffn=ffn)
        for block, kv, ffn in zip(shapes.blocks, heads, channels, strict=True)
    )
    linears = {name: _cut(one, shapes.blocks[one.block], blocks[one.block]) for name, one in shapes.linears.items()}
    return replace(shapes, blocks=blocks, linears=linears)


def _spread(units: list[int], free: list[int], ratio: float) -> list[int]:
    """What each layer keeps: as even a share of the free layers as whole units allow, the later ones losing more."""
    left = list(units)
    if max(units) == 1:  # a single key-value head, which stays
        return left
    gone = removed(ratio, sum(units))
    most = sum(units[at] - 1 for at in free)
    if gone > most:
        raise ValueError(f"a pruning ratio must be <= {most / sum(units):.3f} for this model, got {ratio}")
    weights: NDArray[np.float64] = np.array([units[at] - 1 for at in free], np.float64)
    edges = np.floor(np.concatenate([[0.0], np.cumsum(weights)]) * gone / max(weights.sum(), 1.0) + 1e-9)
    for at, count in zip(free, np.diff(edges), strict=True):
        left[at] -= int(count)
    return left


def _cut(linear: Linear, before: Block, after: Block) -> Linear:
    if linear.reads == "attention":
        return replace(linear, d_out=linear.d_out // before.kv_heads * after.kv_heads)
    if linear.reads == "mixed":
        return replace(linear, d_in=linear.d_in // before.kv_heads * after.kv_heads)
    if linear.reads == "mlp":
        return replace(linear, d_out=linear.d_out // before.ffn * after.ffn)
    if linear.reads == "channels":
        return replace(linear, d_in=linear.d_in // before.ffn * after.ffn)
    return linear


def most_ratio(shapes: Shapes) -> float:
    """The largest ratio that leaves every layer a unit of each kind and the spared layers whole."""
    spared = spared_layers(len(shapes.blocks))
    shares = []
    for width in ("kv_heads", "ffn"):
        units = [int(getattr(block, width)) for block in shapes.blocks]
        if max(units) == 1:
            continue
        shares.append(sum(count - 1 for at, count in enumerate(units) if at not in spared) / sum(units))
    return min(shares, default=0.0)
