"""FedSpine: each device gets its own pruning ratio and rank from a bandit, and prunes and tunes in turns.

After "Efficient Deployment of Large Language Models on Resource-constrained Devices" (FedSpine), of which no code is
public: the bandit is bandit.py's, the reward bandit_reward.py's, the aggregation the default strategy's (fedloom.py)
with the updates of pruned models scattered and averaged over the devices that keep each row (masked.py).

    (ratio, rank)_i,t = bandit_i,t            memory(ratio, rank) <= the device's, ratio >= what it has pruned already
    device: prune to the ratio by importance, tune, answer with its factors and what it keeps
    r_i = clip(drop_i / scale) (1 + rho ratio_i / target) / (1 + rho) / (1 + |T_i - median T| / median T)

Ours: a ratio's room in round t. All devices end at `target`; a bandit is free between a slow and a fast way there:

    target (t / ramp)^3 <= ratio_t <= target (1 - (1 - t / ramp)^3)

Legend: t rounds, i devices; drop: what a round's tuning took off the loss of the device's first batch; T_i seconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fedloom.protocols.messages import DeviceReport, ModelSpec, Patch, Payload, Start, Task, Update
from fedloom.strategies import planning
from fedloom.strategies.bandit import Arm, Box, DiscountedUCB, FixedArm, Limits, Policy, RandomArm
from fedloom.strategies.bandit_reward import Reward
from fedloom.strategies.base import State, Workload
from fedloom.strategies.cost import fixed, marginal
from fedloom.strategies.fedloom import Fedloom
from fedloom.strategies.packing import prefixed, spec_of, under
from fedloom.strategies.server_optimizer import MergeOptions, refuse_elementwise
from fedloom.strategies.sparsity import cubic, most_ratio, narrowed, removed
from fedloom.strategies.unequal import (
    PRUNE_RATIO,
    Seen,
    Standing,
    merge,
    most_rank,
    standing_of,
    standing_table,
    standing_tensors,
    told_shapes,
    underlying,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FedSpine(MergeOptions):
    """Pruning ratios and ranks by a bandit for each device, within its memory; heads and channels removed for real."""

    work: Workload = field(default=Workload(), metadata={"doc": "What a step of the recipe's training is."})
    target: float = field(default=0.3, metadata={"doc": "Share of heads and channels that every device ends without."})
    ramp: int = field(default=8, metadata={"doc": "Rounds until the target is reached."})
    max_rank: int = field(default=32, metadata={"doc": "Largest rank a device may be given."})
    policy: Literal["tree", "grid", "random", "fixed"] = field(
        default="tree",
        metadata={"doc": "Who chooses: `tree`, leaves that split; `grid`, 4 x 4 cells; or a baseline."},
    )
    fixed_rank: int = field(default=8, metadata={"doc": "Rank of the policy `fixed`, whose ratio is the fast way."})
    discount: float = field(default=0.98, metadata={"doc": "How fast a bandit forgets: a round's weight in the next."})
    exploration: float = field(default=0.15, metadata={"doc": "Weight of what a bandit does not know yet."})
    loss_scale: float = field(default=1.0, metadata={"doc": "The drop of the loss that earns a whole reward."})
    rho: float = field(default=1.0, metadata={"doc": "Weight of what is pruned in the reward."})
    reward_loss: bool = field(default=True, metadata={"doc": "Whether the drop of the loss is part of the reward."})
    reward_progress: bool = field(default=True, metadata={"doc": "Whether what is pruned is part of the reward."})
    reward_time: bool = field(default=True, metadata={"doc": "Whether being as fast as the others is part of it."})
    rank_cap: int = field(default=16, metadata={"doc": "Largest rank of a round's delta for each matrix."})
    error_feedback: bool = field(
        default=True, metadata={"doc": "Keep what was cut on the server and add it to the next round."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_elementwise(self, "fedspine")
        if not 0 < self.target < 1 or self.ramp < 1:
            raise ValueError(f"target must be in (0, 1) and ramp >= 1, got {self.target} and {self.ramp}")
        if self.max_rank < 1 or not 1 <= self.fixed_rank <= self.max_rank:
            raise ValueError(f"fixed_rank must be in 1..max_rank, got {self.fixed_rank} and {self.max_rank}")
        self._reward()
        self._policy()

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """An empty patch, and nothing known of any device.

        Raises:
            ValueError: for a model of which nothing can be pruned, or not as much as the target.
        """
        if not spec.groups or spec.shapes is None:
            raise ValueError('fedspine must be given a model that can be pruned: set model.describe = "units"')
        if self.target > (most := most_ratio(told_shapes(spec))):
            raise ValueError(f"target must be <= {most:.3f} for this model (some layers are spared), got {self.target}")
        state = self._merge().init(spec, seed, devices)
        return replace(state, meta={**state.meta, "seed": seed, "standings": {}})

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Each device prunes to its arm's ratio and trains at its rank, on base and patch, from B = 0.

        A device that ran out of memory at less than it said it lends, until no arm is left, gets no task.

        Raises:
            ValueError: for a device that no arm fits, with its name and the smallest need.
        """
        spec, held = spec_of(state), planning.patches(state, devices)
        tasks, need = [], self._needs(spec)
        for report in devices:
            standing = self._standing(state, report.device)
            limits = self._limits(need, most_rank(report, spec), report, standing, round)
            try:
                arm = self._policy().choose(standing.bandit, round, limits)
            except ValueError as error:
                if need(self.target, 1) < standing.bandit.memory_bound:
                    raise
                log.warning("it is left out: %s", error)
                continue
            tasks.append(
                planning.training_task(
                    report,
                    spec,
                    self.scaling,
                    round=round,
                    rank=arm.rank,
                    start_from=Start.PATCH,
                    patch=held[report.version],
                    start=Payload(keep=standing.allowed(spec)),
                    knobs={PRUNE_RATIO: arm.ratio},
                )
            )
        return tasks

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Base and patch on every device, pruned as it stands, and at least as far as all must be by now."""
        spec = spec_of(state)
        tasks = planning.patch_evaluation(state, devices, round, self.scaling)
        floor = min(self._floor(round), most_ratio(told_shapes(spec)))
        standings = [self._standing(state, task.device) for task in tasks]
        return [
            replace(
                task,
                start=Payload(keep=standing.allowed(spec)),
                knobs={PRUNE_RATIO: max(standing.ratio, floor)},
            )
            for task, standing in zip(tasks, standings, strict=True)
        ]

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """Merge the updates as the default strategy does, and let every bandit learn from its device's.

        A device that ran out of memory sends no tensors; its arm earns nothing, and none that needs as much is chosen
        for it again.
        """
        spec = spec_of(state)
        need = self._needs(spec)
        merged, seen = merge(self._merge(), state, updates)
        standings, tensors = dict(state.meta["standings"]), dict(merged.tensors)
        tensors |= prefixed("standing", under("standing", state.tensors))
        for one, reward in zip(seen, self._rewards(seen), strict=True):
            standing = self._learned(state, one, reward, need)
            standings[one.device] = standing_table(standing)
            tensors |= standing_tensors(standing, spec)
        return replace(merged, tensors=tensors, meta={**merged.meta, "standings": standings})

    def catch_up(self, state: State, since: int) -> Patch | None:
        """The deltas that a device at version `since` lacks."""
        return planning.catch_up(state, since)

    def adapter(self, state: State) -> Payload:
        """The whole patch; which units a device does without is its own business."""
        return self._merge().adapter(state)

    def need(self, spec: ModelSpec, ratio: float, rank: int) -> int:
        """Predicted peak bytes of a training step at an arm, whichever units go; a rank may exceed a pruned side.

        What every linear layer's input would keep is counted: where the lowest layers have no adapter, what a device
        saves by pruning them depends on its choice.
        """
        return self._needs(spec)(ratio, rank)

    def _needs(self, spec: ModelSpec) -> Callable[[float, int], int]:
        """`need` of one model: worked out once for each number of units that go, and affine in the rank."""
        shapes = told_shapes(spec)
        step, blocks = self.work.step({}, causal=not shapes.head), shapes.blocks
        totals = sum(block.kv_heads for block in blocks), sum(block.ffn for block in blocks)
        known: dict[tuple[int, int], tuple[int, int]] = {}

        def need(ratio: float, rank: int) -> int:
            gone = removed(ratio, totals[0]), removed(ratio, totals[1])
            if gone not in known:
                small = narrowed(shapes, ratio)
                known[gone] = fixed(small, step), sum(marginal(small, step, name, 1) for name in spec.matrices)
            base, each = known[gone]
            return base + rank * each

        return need

    def _merge(self) -> Fedloom:
        return underlying(self, self.rank_cap, error_feedback=self.error_feedback)

    def _policy(self) -> Policy:
        box = Box(max_ratio=self.target, max_rank=self.max_rank)
        if self.policy == "fixed":
            return FixedArm(ratio=self.target, rank=self.fixed_rank, box=box)
        if self.policy == "random":
            return RandomArm(box=box)
        cells = (4, 4) if self.policy == "grid" else (1, 1)
        return DiscountedUCB(
            box=box,
            discount=self.discount,
            exploration=self.exploration,
            cells=cells,
            split=self.policy == "tree",
        )

    def _reward(self) -> Reward:
        return Reward(
            scale=self.loss_scale,
            rho=self.rho,
            loss=self.reward_loss,
            progress=self.reward_progress,
            time=self.reward_time,
        )

    def _floor(self, round: int) -> float:
        return self.target * min(round / self.ramp, 1.0) ** 3

    def _limits(
        self, need: Callable[[float, int], int], rank: int, report: DeviceReport, standing: Standing, round: int
    ) -> Limits:
        fast = cubic(round, self.ramp, self.target)
        floor = max(standing.ratio, self._floor(round))
        lent = float(report.memory) if report.memory else math.inf
        bound = math.nextafter(standing.bandit.memory_bound, 0.0)
        ceiling = max(fast, floor)
        most = min(rank, self.max_rank)
        middling = min(self.fixed_rank, most)
        ceiling = self._sooner(lambda ratio: need(ratio, middling), min(lent, bound), ceiling)
        return Limits(
            need=need,
            memory=lent,
            ratio_floor=floor,
            ratio_ceiling=ceiling,
            rank_ceiling=most,
        )

    def _sooner(self, need: Callable[[float], int], room: float, ceiling: float) -> float:
        """The ceiling, raised as far as a middling rank needs to fit: such a device is pruned before the others."""
        if need(ceiling) <= room:
            return ceiling
        if need(self.target) > room:
            return self.target
        low, high = ceiling, self.target
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if need(middle) <= room else (middle, high)
        return high

    def _standing(self, state: State, device: str) -> Standing:
        known = standing_of(state, device)
        return known or Standing(bandit=self._policy().init(device, int(state.meta["seed"])))

    def _learned(self, state: State, one: Seen, reward: float, need: Callable[[float, int], int]) -> Standing:
        standing = self._standing(state, one.device)
        ratio = min(one.ratio, self.target)
        arm = Arm(ratio=ratio, rank=one.rank, need=float(need(ratio, one.rank)))
        bandit = self._policy().observe(standing.bandit, one.round, arm, reward, out_of_memory=one.out_of_memory)
        if one.out_of_memory:
            return replace(standing, bandit=bandit)
        return Standing(bandit=bandit, keep=one.keep, ratio=max(standing.ratio, ratio))

    def _rewards(self, seen: Sequence[Seen]) -> list[float]:
        times = [one.seconds for one in seen if not one.out_of_memory]
        median = float(np.median(times)) if times else 0.0
        reward = self._reward()
        return [
            0.0
            if one.out_of_memory
            else reward(one.drop, min(one.ratio / self.target, 1.0), max(one.seconds, 1e-9), max(median, 1e-9))
            for one in seen
        ]
