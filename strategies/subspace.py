"""Strategies whose state is K coefficients: the options they share, their tasks, and what an update adds to c.

    theta_v = theta_0 + sum_k c_v[k] z_k  (or theta_0 + S c_v),    c_{v+1} = c_v + step(sum_i p_i d_i)

d_i [K] is a device's contribution: its scalars at the directions that they belong to. Updates add, so memory is K
numbers whatever the number of devices, and so is what a late device asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fedloom.protocols.directions import check_k, sign_vector
from fedloom.protocols.messages import (
    Array,
    DeviceReport,
    Kind,
    ModelSpec,
    Over,
    Patch,
    Payload,
    Scalars,
    Scope,
    Start,
    Subspace,
    Task,
    Update,
)
from fedloom.protocols.seeds import derive_seed
from fedloom.strategies import planning
from fedloom.strategies.base import State
from fedloom.strategies.coefficients import CoefficientLog, Vector, first_log, read_log, subspace_from
from fedloom.strategies.packing import prefixed, spec_to_meta, under
from fedloom.strategies.server_optimizer import MergeOptions, step

SLACK = 1.01  # what rounding on the wire may add to a scalar at its limit


@dataclass(frozen=True, kw_only=True)
class SubspaceOptions(MergeOptions):
    """The options that every strategy of coefficients has: fields only, no behaviour."""

    k: int = field(default=4096, metadata={"doc": "Dimensions of the subspace: seeds of a pool, or buckets."})
    scope: Literal["all", "lora", "mask"] = field(
        default="all", metadata={"doc": "What is tuned: all weights, adapters, or a sparse mask (model.mask)."}
    )
    rank: int = field(default=0, metadata={"doc": "Rank of the adapters, for scope lora; 0: the fleet's smallest."})
    downlink_bits: int = field(
        default=2, metadata={"doc": "Bits kept below the root mean square of a round's step; the rest is fed back."}
    )
    error_feedback: bool = field(default=True, metadata={"doc": "Add what rounding cut to the next round's step."})
    scalar_limit: float = field(
        default=0.0, metadata={"doc": "Devices clip their scalars to it, and larger ones are refused; 0: off."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_k(self.k, "pool")
        if self.scope not in list(Scope):
            raise ValueError(f"scope must be one of {', '.join(Scope)}, got {self.scope!r}")
        if self.rank < 0:
            raise ValueError(f"rank must be >= 0, got {self.rank}")
        if not 0 <= self.downlink_bits <= 40:
            raise ValueError(f"downlink_bits must be in 0..40, got {self.downlink_bits}")
        if not 0 <= self.scalar_limit < np.inf:
            raise ValueError(f"scalar_limit must be finite and >= 0, got {self.scalar_limit}")


def check_pool(family: str) -> None:
    """Raise ValueError unless a pool can be of this family."""
    if family not in ("gaussian", "rademacher"):
        raise ValueError(f"family must be gaussian or rademacher, got {family!r}")


def first_state(
    options: SubspaceOptions, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport], family: str
) -> State:
    """The base: every coefficient zero.

    Raises:
        ValueError: for a scope that the fleet cannot have.
    """
    rank, scope = 0, Scope(options.scope)
    if scope == Scope.LORA:
        rank = min(planning.fleet_ranks(options.rank, devices, "a subspace of adapters"))
        planning.check_rank("a subspace of adapters", rank, spec)
    if scope == Scope.MASK and not spec.mask:
        raise ValueError("scope mask must have devices that hold a mask (recipe key 'model.mask'), got none")
    subspace = Subspace(
        family=family,
        k=options.k,
        seed=derive_seed(seed, "subspace"),
        scope=scope,
        rank=rank,
        alpha=options.scaling.alpha_for(rank) if rank else 0.0,
        rslora=bool(rank) and options.scaling.rslora,
        mask=spec.mask if scope == Scope.MASK else "",
    )
    log = first_log(spec.base_hash, subspace)
    return State(version=0, tensors=log.tensors(), meta={"spec": spec_to_meta(spec), "seed": seed, "log": log.meta()})


def log_of(state: State) -> CoefficientLog:
    """The coefficients in a state."""
    return read_log(state.version, under_log(state.tensors), state.meta["log"])


def under_log(tensors: Mapping[str, Array]) -> dict[str, Array]:
    return {name: value for name, value in tensors.items() if name.startswith("log/")}


def subspace_of(state: State) -> Subspace:
    """The subspace that a state's coefficients are of."""
    return subspace_from(state.meta["log"]["subspace"])


def tasks(
    options: SubspaceOptions,
    state: State,
    devices: Sequence[DeviceReport],
    round: int,
    *,
    tuner: Callable[[DeviceReport], str],
    start: Callable[[DeviceReport], Payload] = lambda _: Payload(),
    knobs: Mapping[str, float | int | str] | None = None,
    kind: Kind = Kind.TRAIN,
) -> list[Task]:
    """One task a device, at the newest version."""
    subspace, log = subspace_of(state), log_of(state)
    held: dict[int, Patch | None] = {}
    for report in devices:
        if report.version not in held:
            held[report.version] = log.since(report.version)
    return [
        Task(
            device=report.device,
            round=round,
            kind=kind,
            rank=max(subspace.rank, 1),
            alpha=subspace.alpha or 1.0,
            start_from=Start.FRESH,
            tuner=tuner(report) if kind == Kind.TRAIN else "",
            subspace=subspace,
            scalar_limit=options.scalar_limit,
            start=start(report) if kind == Kind.TRAIN else Payload(),
            patch=held[report.version],
            state_round=report.state_round,
            knobs=dict(knobs or {}),
        )
        for report in devices
    ]


def evaluation(options: SubspaceOptions, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
    """Evaluation of the newest version on every device."""
    return tasks(options, state, devices, round, tuner=lambda _: "", kind=Kind.EVALUATE)


def check_scalars(update: Update, subspace: Subspace, limit: float) -> Scalars:
    """Hold an update against the subspace.

    Raises:
        ValueError: for anything but scalars of this subspace, finite and within the limit, with indices in range.
    """
    who, scalars = f"update of {update.device}", update.payload.scalars
    if update.examples < 0:
        raise ValueError(f"{who} must count examples >= 0, got {update.examples}")
    others = (update.payload.factors, update.payload.dense, update.payload.keep)
    if scalars is None or any(others) or update.payload.coefficients is not None:
        raise ValueError(f"{who} must carry scalars and nothing else")
    expected = (Over.STEPS, Over.BASIS) if subspace.family == "sketch" else (Over.POOL,)
    if scalars.over not in expected or scalars.k != subspace.k:
        raise ValueError(
            f"{who} must carry scalars over {' or '.join(expected)} of {subspace.k}, got {scalars.over} of {scalars.k}"
        )
    if scalars.over == Over.BASIS and len(scalars.values) != subspace.k:
        raise ValueError(f"{who} must carry {subspace.k} coordinates, got {len(scalars.values)}")
    if scalars.values.dtype.kind != "f" or not np.isfinite(scalars.values).all():
        raise ValueError(f"{who} must carry finite scalars, got NaN or infinity")
    largest = float(np.abs(scalars.values).max(initial=0.0))
    if limit and largest > SLACK * limit:
        raise ValueError(f"{who} must carry scalars within +-{limit:g}, got {largest:g}")
    if scalars.indices is not None and not bool(((scalars.indices >= 0) & (scalars.indices < subspace.k)).all()):
        raise ValueError(f"{who} must carry seed indices in 0..{subspace.k - 1}, got {scalars.indices.max()}")
    return scalars


def contribution(scalars: Scalars, subspace: Subspace) -> Vector:
    """What scalars add to the coefficients, float64 [K]."""
    total = np.zeros(subspace.k)
    values = scalars.values.astype(np.float64)
    if scalars.over == Over.POOL:
        np.add.at(total, scalars.drawn(), values)
    elif scalars.over == Over.BASIS:
        total += values
    else:
        for t, value in enumerate(values):
            total += value * sign_vector(scalars.seed, t, subspace.k)
    return total


def clipped(change: Vector, norm: float) -> Vector:
    """Scaled down to an L2 norm of at most `norm`; 0 leaves it alone."""
    size = float(np.linalg.norm(change)) if norm else 0.0
    return change * (norm / size) if size > norm else change


def taken(updates: Iterable[Update], state: State, limit: float) -> Iterator[tuple[Update, Scalars]]:
    """The updates one by one, each checked, without those of no examples.

    Raises:
        ValueError: for an update that contradicts the subspace, or after the last when none carried an example.
    """
    subspace, count = subspace_of(state), 0
    for update in updates:
        scalars = check_scalars(update, subspace, limit)
        if update.examples:
            count += 1
            yield update, scalars
    if not count:
        raise ValueError("a round must have an update with at least one example, got none")


def next_state(
    options: SubspaceOptions,
    state: State,
    change: Vector,
    more: Mapping[str, Array] | None = None,
    measured: Vector | None = None,
) -> State:
    """The state after a step along the mean change.

    Args:
        more: replaces further tensors of the strategy's own.
        measured: what the server optimiser's second moment is taken of, where that is not the change.
    """
    scale = None if measured is None else {"c": measured}
    steps, moments = step(options, {"c": change}, under("moments", state.tensors), scale)
    log = log_of(state).push(
        steps["c"].astype(np.float64), options.downlink_bits, error_feedback=options.error_feedback
    )
    tensors = {**log.tensors(), **prefixed("moments", moments), **(more or {})}
    meta: dict[str, Any] = {**state.meta, "log": log.meta()}
    return State(version=state.version + 1, tensors=tensors, meta=meta)


def whole(state: State) -> Payload:
    """The global model relative to the base."""
    return Payload(coefficients=log_of(state).total)
