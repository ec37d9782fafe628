"""What a server remembers of each device that it treats unlike the others: its bandit, and the units that it keeps.

    standing/<device>/keep                                     packed bits, group by group in the order of names, uint8
    standing/<device>/{leaves,rounds,ratios,ranks,rewards}     the bandit's arrays

The server's memory grows with the number of devices by these alone: a bit a unit, and a hundred arms or so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from fedloom.protocols.messages import Array, DeviceReport, ModelSpec, Update
from fedloom.protocols.shapes import Shapes
from fedloom.strategies.bandit import ARRAYS, BanditState
from fedloom.strategies.base import State
from fedloom.strategies.fedloom import Fedloom
from fedloom.strategies.intake import check_update
from fedloom.strategies.masked import Bits, Keep
from fedloom.strategies.packing import spec_of
from fedloom.strategies.server_optimizer import MergeOptions
from fedloom.strategies.sparsity import pruned_share
from fedloom.strategies.unit_order import split

RATIO, RANK, DROP = "ratio", "rank", "drop"  # metrics of an update: what its device did, and what the loss fell by
PRUNE_RATIO = "prune_ratio"  # the knob that tells a device what share of its units must be gone
# Knobs that an update repeats among its metrics:
NEED, FLOPS, PASSES, BITS = "need", "flops", "passes", "bits"
REPEATED = (NEED, FLOPS, PASSES, BITS)
MEASURE = "measure_modules"  # the knob that asks a device how much each module matters
SCORE = "score/"  # before a module's name, in the metrics: how much it matters


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is remembered of an update once its tensors are merged."""

    device: str
    round: int
    ratio: float
    rank: int
    drop: float
    seconds: float
    out_of_memory: bool
    keep: Keep
    examples: int = 0
    scores: Mapping[str, Array] = field(default_factory=dict)  # of its units, where it was asked for them
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One device as the server knows it."""

    bandit: BanditState
    keep: Keep = field(default_factory=dict)
    ratio: float = 0.0

    def allowed(self, spec: ModelSpec) -> dict[str, Bits]:
        """The units that it may keep: those it kept last; all of them at first."""
        return {group: self.keep.get(group, np.ones(units, np.bool_)) for group, units in spec.groups.items()}


def noted(updates: Iterable[Update], spec: ModelSpec, seen: list[Seen]) -> Iterator[Update]:
    """The updates that carry tensors; `seen` gets a line for each of them, and for each that ran out of memory."""
    for update in updates:
        payload, scores = split(update.payload)
        terms, oom = payload.factors.values(), update.cost.out_of_memory
        seen.append(
            Seen(
                device=update.device,
                round=update.round,
                ratio=update.metrics.get(RATIO, 0.0) if oom else pruned_share(update.payload.keep, spec.groups),
                rank=int(update.metrics.get(RANK, 1.0)) if oom else max((term.rank for term in terms), default=1),
                drop=update.metrics.get(DROP, 0.0),
                seconds=update.cost.seconds,
                out_of_memory=oom,
                keep=payload.keep,
                examples=update.examples,
                scores=scores,
                measured=update.metrics,
            )
        )
        if not oom:
            yield replace(update, payload=payload)


def underlying(options: MergeOptions, rank_cap: int, *, error_feedback: bool, partial: bool = False) -> Fedloom:
    """The default strategy, which merges what unequal devices answer; `partial` takes updates of some modules only."""
    return Fedloom(
        scaling=options.scaling,
        clip_norm=options.clip_norm,
        server_optimizer=options.server_optimizer,
        server_lr=options.server_lr,
        server_momentum=options.server_momentum,
        rank_cap=rank_cap,
        error_feedback=error_feedback,
        partial=partial,
    )


def merge(strategy: Fedloom, state: State, updates: Iterable[Update]) -> tuple[State, list[Seen]]:
    """The state with what carries tensors merged, and a line per update.

    Where some ran out of memory and none of the others trained on an example, the state is as it was.

    Raises:
        ValueError: when no update carries an example and none ran out, or one contradicts the model's spec.
    """
    spec, seen = spec_of(state), list[Seen]()
    sound = noted(updates, spec, seen)
    first = _first_that_weighs(sound, spec, partial=strategy.partial)
    if first is None and any(one.out_of_memory for one in seen):
        return state, seen
    return strategy.aggregate(state, chain([first] if first else [], sound)), seen


def _first_that_weighs(updates: Iterator[Update], spec: ModelSpec, *, partial: bool) -> Update | None:
    """The next update with examples; those before it are held against the spec, and nothing of them is merged."""
    for update in updates:
        if update.examples:
            return update
        check_update(update, spec, masked=True, partial=partial)
    return None


def told_shapes(spec: ModelSpec) -> Shapes:
    """The model's shapes, in which every adapted matrix is found.

    Raises:
        ValueError: for a model without shapes, or with shapes that do not have its matrices.
    """
    if spec.shapes is None:
        raise ValueError("a model must have shapes for its costs to be known, got none")
    for name, matrix in spec.matrices.items():
        linear = spec.shapes.linears.get(name)
        if linear is None or (linear.d_out, linear.d_in) != (matrix.d_out, matrix.d_in):
            got = "none" if linear is None else f"{linear.d_out} x {linear.d_in}"
            raise ValueError(f"shapes must have {name} at {matrix.d_out} x {matrix.d_in}, got {got}")
    return spec.shapes


def most_rank(report: DeviceReport, spec: ModelSpec) -> int:
    """The largest rank that a device can train and that every adapted matrix has."""
    return min(report.rank, *(min(matrix.d_out, matrix.d_in) for matrix in spec.matrices.values()))


def standing_of(state: State, device: str) -> Standing | None:
    """What is known of a device; None where nothing is."""
    table = state.meta["standings"].get(device)
    if table is None:
        return None
    start = f"standing/{device}"  # whole names from here on: a device's own may have a slash
    arrays: Any = {name: state.tensors[f"{start}/{name}"] for name in ("keep", *ARRAYS)}
    spec = spec_of(state)
    bits = np.unpackbits(arrays.pop("keep")).astype(np.bool_)
    keep, at = {}, 0
    if table["pruned"]:
        for group in sorted(spec.groups):
            keep[group] = bits[at : at + spec.groups[group]]
            at += spec.groups[group]
    return Standing(bandit=BanditState.restore(arrays, table["bandit"]), keep=keep, ratio=table["ratio"])


def standing_tensors(standing: Standing, spec: ModelSpec) -> dict[str, Array]:
    """A standing's tensors, by full name."""
    device = standing.bandit.device
    whole = np.concatenate([bits for _, bits in sorted(standing.allowed(spec).items(), key=lambda pair: pair[0])])
    tensors: dict[str, Any] = {"keep": np.packbits(whole), **standing.bandit.tensors()}
    return {f"standing/{device}/{name}": np.ascontiguousarray(value) for name, value in tensors.items()}


def standing_table(standing: Standing) -> Mapping[str, Any]:
    """A standing's JSON-able part."""
    return {"bandit": standing.bandit.meta(), "ratio": standing.ratio, "pruned": bool(standing.keep)}
