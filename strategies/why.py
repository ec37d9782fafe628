"""Why a device gets what it gets, in a few words: which budget or rule of the strategy decided."""

from __future__ import annotations

import math
from dataclasses import replace

from fedloom.protocols.messages import DeviceReport, Task
from fedloom.strategies.base import State, Strategy
from fedloom.strategies.fedpipe import Allocation, FedPipe
from fedloom.strategies.fedspine import FedSpine
from fedloom.strategies.packing import spec_of
from fedloom.strategies.unequal import MEASURE, PRUNE_RATIO, most_rank


def why(strategy: Strategy, state: State, report: DeviceReport, task: Task) -> str:
    """What decided a training task, planned from `state` for the device of `report`."""
    if isinstance(strategy, FedSpine):
        return _spine(strategy, state, report, task)
    if isinstance(strategy, FedPipe):
        return _pipe(strategy, state, report, task)
    if task.subspace is not None:
        return f"{task.subspace.k} numbers, whatever its rank"
    return "all it may have" if task.rank >= report.rank else "the rank that all devices share"


def schedule(strategy: Strategy, round: int) -> tuple[float, float] | None:
    """The least and the most that fedspine's schedule lets a device prune by this round; None for others."""
    return strategy.room(round) if isinstance(strategy, FedSpine) else None


def _spine(strategy: FedSpine, state: State, report: DeviceReport, task: Task) -> str:
    """What the device's memory leaves of the schedule's room and of the ranks."""
    spec, lent = spec_of(state), report.memory or math.inf
    slow, fast = schedule(strategy, task.round) or (0.0, 1.0)
    most = min(most_rank(report, spec), strategy.max_rank)
    if float(task.knobs[PRUNE_RATIO]) > fast + 1e-9:
        return "bound by memory: pruned ahead of schedule"
    if strategy.need(spec, slow, most) > lent:
        return "bound by memory: " + ("less rank" if strategy.need(spec, slow, 1) <= lent else "a higher ratio")
    how = {"tree": "its bandit's choice", "grid": "its bandit's choice", "random": "drawn", "fixed": "the fixed arm"}
    return f"{how[strategy.policy]}, all ranks fit"


def _pipe(strategy: FedPipe, state: State, report: DeviceReport, task: Task) -> str:
    """Which budget, once lifted, would change the allocation."""
    got = strategy.allocate(state, report)
    roomy = _differs(got, strategy.allocate(state, replace(report, memory=0)))
    if MEASURE in task.knobs:
        return "warm-up, as much as its memory takes" if roomy else "warm-up: every module alike"
    slow = _differs(got, replace(strategy, pace=0.0).allocate(state, report))
    if roomy or slow:
        return "bound by " + " and ".join(name for name, bound in (("memory", roomy), ("time", slow)) if bound)
    return "all that is worth having"


def _differs(one: Allocation, other: Allocation) -> bool:
    return (dict(one.ranks), one.batch, one.bits) != (dict(other.ranks), other.batch, other.bits)
