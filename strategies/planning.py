"""Tasks: what every strategy's plan has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedloom.protocols.messages import Array, DeviceReport, Kind, LowRank, ModelSpec, Patch, Payload, Start, Task
from fedloom.strategies.base import Scaling, State
from fedloom.strategies.packing import spec_of
from fedloom.strategies.patchlog import read_log


def catch_up(state: State, since: int) -> Patch | None:
    """What a device that last saw version `since` needs; None when it needs nothing merged."""
    return read_log(state).since(since)


def patches(state: State, devices: Sequence[DeviceReport]) -> dict[int, Patch | None]:
    """The patch for each version that these devices hold: devices at one version share one object."""
    log = read_log(state)
    return {version: log.since(version) for version in sorted({report.version for report in devices})}


def check_rank(device: str, rank: int, spec: ModelSpec) -> None:
    """Raise ValueError unless 1 <= rank <= the smaller side of every adapted matrix."""
    if rank < 1:
        raise ValueError(f"the rank of {device} must be >= 1, got {rank}")
    for name, matrix in spec.matrices.items():
        if rank > min(matrix.d_out, matrix.d_in):
            raise ValueError(
                f"the rank of {device} must be <= {min(matrix.d_out, matrix.d_in)} for {name} "
                f"({matrix.d_out} x {matrix.d_in}), got {rank}"
            )


def training_task(
    report: DeviceReport, spec: ModelSpec, scaling: Scaling, *, round: int, rank: int, **fields: Any
) -> Task:
    """One training task for a device; `fields` are the rest of the Task's.

    Raises:
        ValueError: for a rank that a matrix does not have, with the names of the device and of the module.
    """
    check_rank(report.device, rank, spec)
    return Task(
        device=report.device,
        round=round,
        rank=rank,
        alpha=scaling.alpha_for(rank),
        rslora=scaling.rslora,
        state_round=report.state_round,
        **fields,
    )


def merging_tasks(
    state: State, devices: Sequence[DeviceReport], round: int, scaling: Scaling, start_from: Start
) -> list[Task]:
    """Training of a new adapter, from B = 0, on base and patch, each device at its own rank."""
    spec, held = spec_of(state), patches(state, devices)
    return [
        training_task(
            report, spec, scaling, round=round, rank=report.rank, start_from=start_from, patch=held[report.version]
        )
        for report in devices
    ]


def given_tasks(
    state: State,
    devices: Sequence[DeviceReport],
    round: int,
    scaling: Scaling,
    start: Callable[[int], Payload],
    **fields: Any,
) -> list[Task]:
    """Training that goes on from global factors, each device at its own rank or the state's, whichever is smaller.

    Args:
        start: the factors to go on from, by rank; called once for each.
        fields: the rest of the Task's.
    """
    spec, held = spec_of(state), patches(state, devices)
    ranks = {report.device: min(report.rank, int(state.meta["rank"])) for report in devices}
    starts = {rank: start(rank) for rank in sorted(set(ranks.values())) if rank >= 1}
    return [
        training_task(
            report,
            spec,
            scaling,
            round=round,
            rank=ranks[report.device],
            start_from=Start.GIVEN,
            start=starts.get(ranks[report.device], Payload()),
            patch=held[report.version],
            **fields,
        )
        for report in devices
    ]


def patch_evaluation(state: State, devices: Sequence[DeviceReport], round: int, scaling: Scaling) -> list[Task]:
    """Evaluation of base and patch alone: a fresh adapter is zero."""
    held = patches(state, devices)
    return [
        Task(
            device=report.device,
            round=round,
            kind=Kind.EVALUATE,
            rank=max(report.rank, 1),
            alpha=scaling.alpha_for(max(report.rank, 1)),
            rslora=scaling.rslora,
            start_from=Start.FRESH,
            patch=held[report.version],
            state_round=report.state_round,
        )
        for report in devices
    ]


def given_evaluation(
    state: State, devices: Sequence[DeviceReport], round: int, scaling: Scaling, rank: int, **fields: Any
) -> list[Task]:
    """Evaluation of one global adapter of this rank, whole, on every device; `fields` are the rest of the Task's."""
    held = patches(state, devices)
    return [
        Task(
            device=report.device,
            round=round,
            kind=Kind.EVALUATE,
            rank=rank,
            alpha=scaling.alpha_for(rank),
            rslora=scaling.rslora,
            start_from=Start.GIVEN,
            patch=held[report.version],
            state_round=report.state_round,
            **fields,
        )
        for report in devices
    ]


def scaled_term(b: Array, a: Array, scaling: Scaling) -> LowRank:
    """Factors with the alpha that the recipe gives to their rank."""
    return LowRank(b=b, a=a, alpha=scaling.alpha_for(a.shape[0]), rslora=scaling.rslora)


def fleet_ranks(option: int, devices: Sequence[DeviceReport], name: str) -> list[int]:
    """The ranks that size a shared adapter: the option where it is set, else those of the whole fleet.

    Raises:
        ValueError: when neither is known.
    """
    if option:
        return [option]
    if not devices:
        raise ValueError(f"{name} must be told its option rank >= 1 or the fleet's devices, got neither")
    return [report.rank for report in devices]


def check_reach(devices: Sequence[DeviceReport], rank: int) -> None:
    """Raise ValueError for a device that cannot train a shared rank."""
    for report in devices:
        if report.rank < rank:
            raise ValueError(f"{report.device} must train the shared rank {rank}, got a largest rank of {report.rank}")
