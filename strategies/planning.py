"""Tasks: what every strategy's plan has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedloom.protocols.messages import Array, DeviceReport, Kind, LowRank, ModelSpec, Patch, Payload, Start, Task
from fedloom.strategies.base import Scaling, State
from fedloom.strategies.patchlog import read_log


def catch_up(state: State, since: int) -> Patch | None:
    """What a device that last saw version `since` needs; None when it needs nothing merged."""
    return read_log(state).since(since)


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
    state: State, report: DeviceReport, spec: ModelSpec, scaling: Scaling, *, round: int, rank: int, **fields: Any
) -> Task:
    """One training task, with the patch that its device lacks.

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
        patch=catch_up(state, report.version),
        state_round=report.state_round,
        **fields,
    )


def patch_evaluation(state: State, devices: Sequence[DeviceReport], round: int, scaling: Scaling) -> list[Task]:
    """Evaluation of base and patch alone: a fresh adapter is zero."""
    return [
        Task(
            device=report.device,
            round=round,
            kind=Kind.EVALUATE,
            rank=max(report.rank, 1),
            alpha=scaling.alpha_for(max(report.rank, 1)),
            rslora=scaling.rslora,
            start_from=Start.FRESH,
            patch=catch_up(state, report.version),
            state_round=report.state_round,
        )
        for report in devices
    ]


def given_evaluation(
    state: State, devices: Sequence[DeviceReport], round: int, adapter: Payload, **fields: Any
) -> list[Task]:
    """Evaluation of one global adapter, whole, on every device."""
    term = next(iter(adapter.factors.values()))
    return [
        Task(
            device=report.device,
            round=round,
            kind=Kind.EVALUATE,
            rank=term.rank,
            alpha=term.alpha,
            rslora=term.rslora,
            start_from=Start.GIVEN,
            start=adapter,
            patch=catch_up(state, report.version),
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
