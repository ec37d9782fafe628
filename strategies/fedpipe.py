"""FedPipe: each device gets the modules that deserve an adapter, their ranks, a batch and the bits of its base.

After "Automated Federated Pipeline for Parameter-Efficient Fine-Tuning of Large Language Models" (FedPipe), of which no
code is public. A device's first training is a warm-up: every module at one small rank, at whatever batch and bits fit,
and how much each module's gradient matters is measured on the way. From then on its allocation is a multiple-choice
knapsack (knapsack.py) over cost.py's predictions:

    maximise  q(bits) sum_m score_m gain(r_m)       gain(r) = 1 - 2^(-r / half),  r_m in {0, ranks}
    subject to  memory(ranks, batch, bits) <= M_i,  seconds(ranks, batch, bits) <= pace x T_i
    score_m = EMA of |<W, g_W>| summed over the module, through its adapter's gradients
    T_i     = seconds of a warm-up: the fleet's median, or the device's own where it is slower (no allocation makes the
              frozen base faster, so nothing would be within the median)

Adapters are averaged per module over the devices that have it (masked.py), by the default strategy. The concave gain
and the worth q of bits are ours; FedPipe's are not published.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import DeviceReport, ModelSpec, Patch, Payload, Start, Task, Update
from fedloom.protocols.shapes import Shapes
from fedloom.strategies import planning
from fedloom.strategies.base import State, Workload
from fedloom.strategies.cost import BITS as KNOWN_BITS
from fedloom.strategies.cost import Work, fixed, flops, flops_marginal, marginal, memory
from fedloom.strategies.fedloom import Fedloom
from fedloom.strategies.knapsack import Choice, Setting, solve_settings
from fedloom.strategies.packing import spec_of
from fedloom.strategies.server_optimizer import MergeOptions, refuse_elementwise
from fedloom.strategies.unequal import (
    BITS,
    FLOPS,
    MEASURE,
    NEED,
    PASSES,
    SCORE,
    Seen,
    merge,
    most_rank,
    told_shapes,
    underlying,
)

log = logging.getLogger(__name__)

POINTS = 8  # tasks by which a device's speed is judged
STATES = 2000  # of the knapsack: its answer is exact, or proven to be as near as it says
SHORTEST = 1e-9  # seconds of a task: what a device may say, and a rate stays finite
MARGIN = 0.05  # share of the memory that ran out which is left free from then on


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What one device is to train: the ranks of its modules, and how."""

    ranks: Mapping[str, int]
    batch: int
    bits: int
    memory: int  # predicted bytes
    flops: float  # of the whole task


@dataclass(frozen=True, kw_only=True)
class FedPipe(MergeOptions):
    """Adapters where they matter, ranks, batch and bits by each device's memory and time."""

    work: Workload = field(default=Workload(), metadata={"doc": "What a step of the recipe's training is."})
    ranks: tuple[int, ...] = field(default=(2, 4, 8, 16, 32), metadata={"doc": "Ranks that a module may get."})
    bits: tuple[int, ...] = field(default=(16, 8, 4), metadata={"doc": "Bits that a base may be held in."})
    worth_8: float = field(default=0.995, metadata={"doc": "Worth of an update from an 8-bit base, of 1."})
    worth_4: float = field(default=0.95, metadata={"doc": "Worth of an update from a 4-bit base, of 1."})
    half: float = field(default=8.0, metadata={"doc": "Rank that gives a module half of what an adapter can."})
    pace: float = field(
        default=1.0,
        metadata={"doc": "Time a device may take, of the fleet's median warm-up, or of its own if slower; 0: any."},
    )
    warmup_rank: int = field(default=4, metadata={"doc": "Rank of every module in a device's warm-up."})
    rank_cap: int = field(default=16, metadata={"doc": "Largest rank of a round's delta for each matrix."})
    error_feedback: bool = field(
        default=True, metadata={"doc": "Keep what was cut on the server and add it to the next round."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_elementwise(self, "fedpipe")
        if not self.ranks or min(self.ranks) < 1 or list(self.ranks) != sorted(set(self.ranks)):
            raise ValueError(f"ranks must ascend from 1 or more, got {list(self.ranks)}")
        if not self.bits or not set(self.bits) <= set(KNOWN_BITS):
            raise ValueError(f"bits must be of {list(KNOWN_BITS)}, got {list(self.bits)}")
        if not 0 < self.worth_4 <= self.worth_8 <= 1:
            raise ValueError(f"0 < worth_4 <= worth_8 <= 1 must hold, got {self.worth_4} and {self.worth_8}")
        if not self.half > 0 or not 0 <= self.pace < math.inf or self.warmup_rank < 1:
            raise ValueError(
                f"half must be > 0, pace >= 0 and warmup_rank >= 1, got {self.half}, {self.pace}, {self.warmup_rank}"
            )

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """An empty patch, and nothing known of any device.

        Raises:
            ValueError: for a model whose shapes the devices do not tell, or that do not have its matrices.
        """
        if spec.shapes is None:
            raise ValueError("fedpipe must be told the model's shapes: set model.describe = 'shapes'")
        told_shapes(spec)
        state = self._merge().init(spec, seed, devices)
        return replace(state, meta={**state.meta, "pipes": {}})

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """A warm-up for each device that is new, and its allocation for one that is known.

        A device that ran out of memory at less than it said it lends, until nothing is left, gets no task.

        Raises:
            ValueError: for a device that nothing fits, with its name and the smallest need.
        """
        spec, held = spec_of(state), planning.patches(state, devices)
        tasks = []
        for report in devices:
            known = state.meta["pipes"].get(report.device, {})
            try:
                chosen = self.allocate(state, report)
            except ValueError as error:
                if "bound" not in known:
                    raise
                log.warning("it is left out: %s", error)
                continue
            knobs: dict[str, float | int | str] = {
                "batch_size": chosen.batch,
                "accumulate": self._accumulate(chosen.batch),
                BITS: chosen.bits,
                NEED: chosen.memory,
                FLOPS: chosen.flops,
                PASSES: self._passes(chosen.batch),
            }
            if "scores" not in known:
                knobs[MEASURE] = 1
            task = planning.training_task(
                report,
                spec,
                self.scaling,
                round=round,
                rank=max(chosen.ranks.values()),
                start_from=Start.PATCH,
                patch=held[report.version],
                ranks=dict(chosen.ranks),
                knobs=knobs,
            )
            tasks.append(task)
        return tasks

    def allocate(self, state: State, report: DeviceReport) -> Allocation:
        """What a device gets next.

        Raises:
            ValueError: when nothing fits it, with its name and the smallest need.
        """
        known = state.meta["pipes"].get(report.device, {})
        if report.rank < 1:
            raise ValueError(f"the rank of {report.device} must be >= 1, got {report.rank}")
        lent = min(float(report.memory) or math.inf, known.get("bound", math.inf))
        if "scores" not in known:
            return self._warm_up(state, report, lent)
        return self._solve(state, report, known, lent)

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Base and patch on every device, the base in as many bits as its training had."""
        tasks = planning.patch_evaluation(state, devices, round, self.scaling)
        pipes = state.meta["pipes"]
        return [replace(task, knobs={BITS: pipes.get(task.device, {}).get("bits", 16)}) for task in tasks]

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """Merge as the default strategy does, each module over the devices that have it, and learn of the devices."""
        spec = spec_of(state)
        merged, seen = merge(self._merge(), state, updates)
        pipes: dict[str, Any] = dict(state.meta["pipes"])
        for one in seen:
            pipes[one.device] = _learned(pipes.get(one.device, {}), one, spec)
        return replace(merged, meta={**merged.meta, "pipes": pipes})

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The deltas that a device at version `since` lacks."""
        return planning.catch_up(state, since)

    def adapter(self, state: State) -> Payload:
        """The whole patch."""
        return self._merge().adapter(state)

    def _merge(self) -> Fedloom:
        return underlying(self, self.rank_cap, error_feedback=self.error_feedback, partial=True)

    def _accumulate(self, batch: int) -> int:
        """Passes of a smaller batch that make the recipe's step."""
        return self.work.accumulate * -(-self.work.batch // batch)

    def _batches(self) -> list[int]:
        """The recipe's batch and its halves, the largest first."""
        sizes = [self.work.batch]
        while sizes[-1] > 1:
            sizes.append(sizes[-1] // 2)
        return sizes

    def _step(self, shapes: Shapes, ranks: Mapping[str, int], batch: int, bits: int) -> Work:
        return self.work.step(ranks, causal=not shapes.head, batch=batch, bits=bits)

    def _passes(self, batch: int) -> int:
        return self.work.steps * self._accumulate(batch)

    def _allocation(self, shapes: Shapes, ranks: Mapping[str, int], batch: int, bits: int) -> Allocation:
        step = self._step(shapes, ranks, batch, bits)
        return Allocation(
            ranks=ranks,
            batch=batch,
            bits=bits,
            memory=memory(shapes, step).total,
            flops=flops(shapes, step) * self._passes(batch),
        )

    def _warm_up(self, state: State, report: DeviceReport, lent: float) -> Allocation:
        """Every module at the warm-up's rank: the most bits, then the largest batch, that fit; of rank 1 if need be."""
        spec, smallest = spec_of(state), math.inf
        shapes, modules = told_shapes(spec), sorted(spec.matrices)
        for rank in dict.fromkeys((min(self.warmup_rank, most_rank(report, spec)), 1)):
            for bits in sorted(self.bits, reverse=True):
                for batch in self._batches():
                    found = self._allocation(shapes, dict.fromkeys(modules, rank), batch, bits)
                    smallest = min(smallest, found.memory)
                    if found.memory <= lent:
                        return found
        raise _nothing_fits(report, smallest, lent)

    def _solve(self, state: State, report: DeviceReport, known: Mapping[str, Any], lent: float) -> Allocation:
        spec = spec_of(state)
        shapes, modules, most = told_shapes(spec), sorted(spec.matrices), most_rank(report, spec)
        options = [0, *([rank for rank in self.ranks if rank <= most] or [most])]
        pairs = [(batch, bits) for bits in sorted(self.bits, reverse=True) for batch in self._batches()]
        settings = [self._setting(shapes, modules, options, known, batch, bits) for batch, bits in pairs]
        ranks: dict[str, int] = {}
        try:
            at, answer = solve_settings(settings, min(lent, 2.0**62), self._seconds(state, known), max_states=STATES)
            ranks = {name: options[to] for name, to in zip(modules, answer.indices, strict=True) if options[to]}
        except ValueError as error:
            log.info("%s gets the least: %s", report.device, error)
        if ranks:
            return self._allocation(shapes, ranks, *pairs[at])
        best = sorted(modules, key=lambda name: -known["scores"].get(name, 0.0))
        return self._least(shapes, report, best, pairs, options[1], lent)

    def _least(
        self,
        shapes: Shapes,
        report: DeviceReport,
        modules: Sequence[str],
        pairs: Sequence[tuple[int, int]],
        rank: int,
        lent: float,
    ) -> Allocation:
        """One module alone: the most bits, then the largest batch, then the best module, that fit."""
        smallest = math.inf
        for batch, bits in pairs:
            for name in modules:
                found = self._allocation(shapes, {name: rank}, batch, bits)
                smallest = min(smallest, found.memory)
                if found.memory <= lent:
                    return found
        raise _nothing_fits(report, smallest, lent)

    def _setting(
        self,
        shapes: Shapes,
        modules: Sequence[str],
        options: Sequence[int],
        known: Mapping[str, Any],
        batch: int,
        bits: int,
    ) -> Setting:
        """The knapsack of one batch and one number of bits."""
        passes, rate = self._passes(batch), float(known["rate"])
        slack = passes * float(known.get("overhead", 0.0))
        bare = self._step(shapes, {}, batch, bits)
        worth = {16: 1.0, 8: self.worth_8, 4: self.worth_4}[bits]
        total = sum(known["scores"].values()) or 1.0
        groups = []
        for name in modules:
            score = known["scores"].get(name, 0.0)
            groups.append(
                [
                    Choice(
                        value=worth * score / total * (1 - 2.0 ** (-rank / self.half)),
                        memory=marginal(shapes, bare, name, rank),
                        seconds=passes * flops_marginal(shapes, bare, name, rank) / rate,
                    )
                    for rank in options
                ]
            )
        return Setting(groups=groups, memory=fixed(shapes, bare), seconds=passes * flops(shapes, bare) / rate + slack)

    def _seconds(self, state: State, known: Mapping[str, Any]) -> float | None:
        """How long a device may take: `pace` of a warm-up at the fleet's median speed, or at its own where slower."""
        if not self.pace:
            return None
        shapes, batch = told_shapes(spec_of(state)), self.work.batch
        work = self._allocation(shapes, dict.fromkeys(spec_of(state).matrices, self.warmup_rank), batch, 16).flops

        def took(pipe: Mapping[str, Any]) -> float:
            return work / float(pipe["rate"]) + self._passes(batch) * float(pipe.get("overhead", 0.0))

        fleet = [took(pipe) for pipe in state.meta["pipes"].values() if "rate" in pipe]
        return self.pace * max(float(np.median(fleet)), took(known))


def speed(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """A device's operations a second and its seconds a pass beside them, from (flops, passes, seconds) of its tasks.

    Least squares of relative errors, both >= 0; one task, or tasks all alike, tell a rate alone.
    """
    table: NDArray[np.float64] = np.array(points, np.float64)
    work, took = table[:, :2], table[:, 2]
    rows = work / took[:, None]
    scale = rows.max(0)
    answer, _, rank, _ = np.linalg.lstsq(rows / scale, np.ones(len(rows)), rcond=1e-3)
    slope, overhead = answer / scale
    if rank == 2 and slope > 0 and overhead > 0:
        return float(1 / slope), float(overhead)
    return float(work[:, 0].sum() / took.sum()), 0.0


def _nothing_fits(report: DeviceReport, smallest: float, lent: float) -> ValueError:
    need = f"the smallest need is {smallest:.0f} bytes, its memory is {lent:.0f}"
    return ValueError(f"nothing fits device {report.device}: {need}")


def _learned(known: Mapping[str, Any], one: Seen, spec: ModelSpec) -> dict[str, Any]:
    """What is known of a device after its answer."""
    need = one.measured.get(NEED, 0.0)
    if one.out_of_memory:
        bound = min(known.get("bound", math.inf), need * (1 - MARGIN))
        return {**known, "bound": bound}
    learned = {**known, "bits": int(one.measured.get(BITS, 16.0))}
    if one.measured.get(FLOPS):
        point = [one.measured[FLOPS], one.measured.get(PASSES, 1.0), max(one.seconds, SHORTEST)]
        learned["points"] = [*known.get("points", []), point][-POINTS:]
        learned["rate"], learned["overhead"] = speed(learned["points"])
    scores = {name: max(one.measured.get(SCORE + name, 0.0), 0.0) for name in sorted(spec.matrices)}
    if "scores" not in known and "rate" in learned and any(scores.values()):
        learned["scores"] = scores  # by name: a checkpoint does not keep the order of a spec's matrices
    return learned
