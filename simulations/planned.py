"""What each device of a recipe's fleet would get, and why, before anything is trained (`fedloom plan`).

The tasks are the strategy's own, planned from its first state; memory and seconds are those that strategies/cost.py
predicts, seconds on the clock of the device's profile. Bytes are of tensors: a frame's header and scales come on top.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedloom.client.adjusting import repeated
from fedloom.client.cost import shapes_of
from fedloom.client.device import Device
from fedloom.client.model import Resident
from fedloom.client.pruning.rounds import asked_ratio
from fedloom.client.store import DeviceStore
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import Cost, DeviceReport, Task, Update
from fedloom.protocols.shapes import Shapes
from fedloom.server.app import build_strategy, workload
from fedloom.server.complete import complete
from fedloom.simulations.clock import BYTES, Load, compute_seconds, step_of
from fedloom.simulations.fleet import Fleet
from fedloom.simulations.naming import run_name
from fedloom.strategies.base import State, Strategy
from fedloom.strategies.cost import Work, factor_bytes, memory
from fedloom.strategies.fedpipe import FedPipe
from fedloom.strategies.fedspine import FedSpine
from fedloom.strategies.patchlog import size
from fedloom.strategies.sparsity import narrowed
from fedloom.strategies.unequal import FLOPS, PRUNE_RATIO
from fedloom.strategies.why import why

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One device's round. None: not predicted (tasks in a subspace), not said, or no profile to tell seconds by."""

    device: str
    kind: str  # its profile
    lends: int  # bytes; 0: no limit
    largest_rank: int
    rank: int
    ranks: Mapping[str, int]  # by module, where modules differ
    ratio: float | None
    batch: int
    bits: int
    memory: int | None  # bytes at the worst moment of a step
    seconds: float | None
    down: int | None  # bytes of the next round's patch, for a device that missed none: its slice, once it has pruned
    up: int | None
    why: str


def whole_step(config: RunConfig, resident: Resident, rank: int) -> int:
    """Bytes of a step on the unpruned model in its own dtype, every module at `rank`, the recipe's batch and length."""
    shapes = shapes_of(resident)
    step = workload(config).step(dict.fromkeys(resident.spec.matrices, rank), causal=not shapes.head)
    return memory(shapes, step).total


def plan_fleet(
    config: RunConfig, resident: Resident, *, round: int = 1, measure: bool = False, tell: Tell = lambda line: None
) -> list[Planned]:
    """Plan one round for all devices, as if none had trained yet.

    Args:
        measure: fedpipe alone: run the first device's warm-up, take its scores for everyone's, and plan what follows.
        tell: told what is going on.

    Raises:
        ValueError: as the run itself would, for a device that nothing fits; for a round beyond the recipe's; for a
            model whose costs are not known.
    """
    if not 1 <= round <= config.server.rounds:
        raise ValueError(f"a round must be in 1..{config.server.rounds} (recipe key 'server.rounds'), got {round}")
    strategy = build_strategy(config)
    if measure and not isinstance(strategy, FedPipe):
        raise ValueError(f"only fedpipe has a warm-up to measure, got strategy {config.strategy.name!r}")
    tell("dealing out the data")
    fleet = Fleet(config)
    forecast = _Forecast(config, fleet, strategy, resident)
    reports = [_report(fleet, index) for index in range(config.fleet.devices)]
    state = strategy.init(resident.spec, config.seed, reports)
    if measure:
        tell("measuring the first device's warm-up")
        state, round = forecast.measured(state, reports), max(round, 2)
    tell("planning")
    tasks = strategy.plan(state, reports, round)
    delta = forecast.delta(tasks)
    return [
        forecast.one(state, report, task, index, delta)
        for index, (report, task) in enumerate(zip(reports, tasks, strict=True))
    ]


def _report(fleet: Fleet, index: int) -> DeviceReport:
    return DeviceReport(
        device=fleet.name(index),
        examples=len(fleet.holding(index).train),
        rank=fleet.rank(index),
        capabilities=(fleet.capability(index),),
        memory=fleet.memory(index),
    )


class _Forecast:
    """Predictions for the tasks of one recipe."""

    def __init__(self, config: RunConfig, fleet: Fleet, strategy: Strategy, resident: Resident) -> None:
        self._config, self._fleet, self._strategy, self._resident = config, fleet, strategy, resident
        self._shapes, self._run = shapes_of(resident), run_name(config)

    def one(self, state: State, report: DeviceReport, task: Task, index: int, delta: Mapping[str, int]) -> Planned:
        kind, whole = self._fleet.profile(index), self._complete(task)
        shapes, ratio = self._narrowed(task), task.knobs.get(PRUNE_RATIO)
        known = task.subspace is None  # costs are known of adapters alone
        sides = {name: min(linear.d_out, linear.d_in) for name, linear in shapes.linears.items()}
        ranks = {name: min(rank, sides[name]) for name, rank in self._ranks(task).items()}
        step = step_of(whole, ranks, shapes, self._config)
        need, up = self._need(task, shapes, step), self._up_bytes(shapes, task)
        down = self._start_bytes(task) + self._down_bytes(shapes, delta)
        taken = None
        if known and kind is not None:
            computing = compute_seconds(shapes, step, whole, kind)
            taken = Load(down_bytes=down, compute_seconds=computing, up_bytes=up).seconds(kind)
        reason = why(self._strategy, state, report, task)
        if known and report.memory and need > report.memory:
            reason += "; more than it lends: runs out of memory"
        return Planned(
            device=report.device,
            kind=kind.name if kind else "",
            lends=report.memory,
            largest_rank=report.rank,
            rank=task.rank,
            ranks=dict(task.ranks),
            ratio=None if ratio is None else float(ratio),
            batch=step.batch,
            bits=step.bits,
            memory=need if known else None,
            seconds=taken,
            down=down if known else None,
            up=up if known else None,
            why=reason,
        )

    def delta(self, tasks: Sequence[Task]) -> dict[str, int]:
        """The rank of one round's delta by module: the sum of all ranks of a cohort, up to the strategy's cap."""
        fleet, server = len(tasks), self._config.server
        share = (min(server.cohort, fleet) or fleet) / fleet
        cap = getattr(self._strategy, "rank_cap", math.inf)
        merged = [task for task in tasks if task.subspace is None and task.send and not task.start.factors]
        ranks = {}
        for name, matrix in self._resident.spec.matrices.items():
            stacked = math.ceil(share * sum(self._ranks(task).get(name, 0) for task in merged))
            ranks[name] = int(min(stacked, cap, matrix.d_out, matrix.d_in))
        return ranks

    def measured(self, state: State, reports: Sequence[DeviceReport]) -> State:
        """The state after a warm-up of the whole fleet, the first device's measurement standing for everybody's."""
        config, resident, tasks = self._config, self._resident, self._strategy.plan(state, reports, 1)
        with tempfile.TemporaryDirectory(prefix="fedloom-plan-") as folder:
            device = Device(
                reports[0].device,
                resident=resident,
                train=self._fleet.holding(0).train,
                test=(),
                store=DeviceStore(Path(folder) / "patches", Path(folder) / "state"),
                rank=reports[0].rank,
                data_config=config.data,
                eval_config=config.eval,
            )
            first = device.handle(self._complete(tasks[0]))
        return self._strategy.aggregate(state, [self._as_if(first, task, at) for at, task in enumerate(tasks)])

    def _as_if(self, first: Update, task: Task, index: int) -> Update:
        """The first device's answer as another's, in the other's time."""
        asked = repeated(task)
        kind = self._fleet.profile(index)
        taken = first.cost.seconds * asked[FLOPS] / first.metrics[FLOPS]
        if kind is not None:
            whole = self._complete(task)
            step = step_of(whole, task.ranks, self._shapes, self._config)
            taken = compute_seconds(self._shapes, step, whole, kind)
        return replace(first, device=task.device, metrics={**first.metrics, **asked}, cost=Cost(seconds=taken))

    def _complete(self, task: Task) -> Task:
        return complete(task, self._config, run=self._run)

    def _ranks(self, task: Task) -> dict[str, int]:
        return dict(task.ranks) or dict.fromkeys(self._resident.spec.matrices, task.rank)

    def _narrowed(self, task: Task) -> Shapes:
        return narrowed(self._shapes, asked_ratio(task)) if isinstance(self._strategy, FedSpine) else self._shapes

    def _need(self, task: Task, shapes: Shapes, step: Work) -> int:
        """What the strategy itself counts on where it plans by memory, else a step's prediction."""
        if isinstance(self._strategy, FedSpine):
            return self._strategy.need(self._resident.spec, asked_ratio(task), task.rank)
        return memory(shapes, step).total

    def _start_bytes(self, task: Task) -> int:
        return BYTES[self._config.wire.down] * size(task.start)

    def _down_bytes(self, shapes: Shapes, delta: Mapping[str, int]) -> int:
        """A delta of these ranks, dense where that is smaller, for a model of these shapes."""
        item, total = BYTES[self._config.wire.down], shapes.head
        for name, rank in delta.items():
            whole, mine = self._shapes.linears[name], shapes.linears[name]
            total += mine.size if whole.size < rank * (whole.d_out + whole.d_in) else rank * (mine.d_out + mine.d_in)
        return item * total

    def _up_bytes(self, shapes: Shapes, task: Task) -> int:
        if not task.send or task.subspace is not None:
            return 0
        item = BYTES[self._config.wire.up]
        return factor_bytes(shapes, self._ranks(task), item=item, a_too=task.shared_a_seed is None) + item * shapes.head
