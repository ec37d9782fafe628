"""FedSpine: each device gets its own pruning ratio and rank from a bandit, and prunes and tunes in turns.

After "Efficient Deployment of Large Language Models on Resource-constrained Devices" (FedSpine), of which no code is
public: the bandit is bandit.py's, the reward bandit_reward.py's, the aggregation the default strategy's (fedloom.py)
with the updates of pruned models scattered and averaged over the devices that keep each row (masked.py).

    (ratio, rank)_i,t = bandit_i,t            memory(ratio, rank) <= the device's, ratio >= what it has pruned already
    device: prune to the ratio by importance, tune, answer with its factors and what it keeps
    r_i = clip(drop_i / (s median drop)) (1 + rho ratio_i / target) / (1 + rho) / (1 + |T_i - median T| / median T)

Ours: which units go. All go by one order (unit_order.py), of which nothing is known in the first round: then a device
prunes no further than it must, and chooses by itself.

Ours, too: a ratio's room in round t. All devices end at `target`; a bandit is free between a slow and a fast way there:

    target (t / ramp)^3 <= ratio_t <= target (1 - (1 - t / ramp)^3)

Legend: t rounds, i devices; drop: what a round's tuning took off the loss of the device's first batch; T_i seconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np

from fedloom.protocols.messages import DeviceReport, ModelSpec, Patch, Payload, Start, Task, Update
from fedloom.strategies import planning
from fedloom.strategies.bandit import Arm, BanditState, Box, DiscountedUCB, Evidence, Limits, Policy
from fedloom.strategies.bandit_baselines import FixedArm, RandomArm
from fedloom.strategies.bandit_reward import Reward
from fedloom.strategies.base import State, Workload
from fedloom.strategies.cost import fixed, marginal
from fedloom.strategies.fedloom import Fedloom
from fedloom.strategies.masked import Keep, slice_patch
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
from fedloom.strategies.unit_order import UNIT_SCORES, Measured, UnitOrder, units_of

log = logging.getLogger(__name__)

TINY_DROP: Final = 1e-6  # a round's median drop counts as at least this
FLEET: Final = ""  # the name of the bandit that learns from all devices


@dataclass(frozen=True, kw_only=True)
class FedSpine(MergeOptions):
    """Pruning ratios and ranks by a bandit for each device, within its memory; heads and channels removed for real."""

    work: Workload = field(default=Workload(), metadata={"doc": "What a step of the recipe's training is."})
    target: float = field(default=0.3, metadata={"doc": "Share of heads and channels that every device ends without."})
    ramp: int = field(default=8, metadata={"doc": "Rounds until the target is reached."})
    max_rank: int = field(default=16, metadata={"doc": "Largest rank a device may be given."})
    min_rank: int = field(default=4, metadata={"doc": "Ranks below it are for devices that no larger one fits."})
    policy: Literal["tree", "grid", "random", "fixed"] = field(
        default="tree",
        metadata={"doc": "Who chooses: `tree`, leaves that split; `grid`, 4 x 4 cells; or a baseline."},
    )
    fixed_rank: int = field(default=8, metadata={"doc": "Rank of the policy `fixed`, whose ratio is the fast way."})
    discount: float = field(default=0.98, metadata={"doc": "How fast a bandit forgets: a round's weight in the next."})
    exploration: float = field(default=0.15, metadata={"doc": "Weight of what a bandit does not know yet."})
    share: float = field(
        default=0.1,
        metadata={"doc": "What an arm that another device tried counts for a device; 0: each learns alone."},
    )
    loss_scale: float = field(
        default=2.0, metadata={"doc": "The drop of the loss that earns a whole reward, in medians of the round's."}
    )
    masks: Literal["fleet", "own"] = field(
        default="fleet",
        metadata={
            "doc": "Which units go: `fleet`, by one order from the importances that all measured, which they send; "
            "`own`, each device by its own, which stay with it."
        },
    )
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
        if self.min_rank < 1:
            raise ValueError(f"min_rank must be >= 1, got {self.min_rank}")
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
        if self.masks == "fleet":
            units_of(spec)  # raises where a group has no place
        state = self._merge().init(spec, seed, devices)
        fleet = self._policy().init(FLEET, seed)
        tensors = {**state.tensors, **prefixed("fleet", fleet.tensors())}
        return replace(
            state, tensors=tensors, meta={**state.meta, "seed": seed, "standings": {}, "fleet": fleet.meta()}
        )

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Each device prunes to its arm's ratio and trains at its rank, on base and its slice of the patch, from B = 0.

        A device that ran out of memory at less than it said it lends, until no arm is left, gets no task.

        Raises:
            ValueError: for a device that no arm fits, with its name and the smallest need.
        """
        spec, held = spec_of(state), planning.patches(state, devices)
        tasks, need, policy, fleet = [], self._needs(spec), self._policy(), self._evidence(state, round)
        kept = self._kept(state)
        for report in devices:
            standing = self._standing(state, report.device)
            allowed = standing.allowed(spec)
            limits = self._limits(need, most_rank(report, spec), report, standing, round)
            try:
                arm = policy.choose(standing.bandit, round, limits, fleet)
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
                    patch=slice_patch(held[report.version], spec, allowed),
                    start=Payload(keep=kept(arm.ratio, allowed)),
                    knobs={PRUNE_RATIO: arm.ratio, **({UNIT_SCORES: True} if self.masks == "fleet" else {})},
                )
            )
        return tasks

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """Base and patch on every device, pruned as it stands, and at least as far as all must be by now."""
        spec = spec_of(state)
        tasks = planning.patch_evaluation(state, devices, round, self.scaling)
        floor = min(self._floor(round), most_ratio(told_shapes(spec)))
        kept, judged = self._kept(state), []
        for task in tasks:
            standing = self._standing(state, task.device)
            ratio, allowed = max(standing.ratio, floor), standing.allowed(spec)
            patch = slice_patch(task.patch, spec, allowed)
            start = Payload(keep=kept(ratio, allowed))
            judged.append(replace(task, start=start, patch=patch, knobs={PRUNE_RATIO: ratio}))
        return judged

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
        fleet = self._fleet(state)
        for one, reward in zip(seen, self._rewards(seen), strict=True):
            standing = self._learned(state, one, reward, need)
            standings[one.device] = standing_table(standing)
            tensors |= standing_tensors(standing, spec)
            if not one.out_of_memory:
                fleet = self._policy().observe(fleet, one.round, self._arm(one, need), reward)
        tensors |= prefixed("fleet", fleet.tensors())
        if self.masks == "fleet":
            tensors |= prefixed("order", reordered(state, seen, self.target).tensors())
        return replace(merged, tensors=tensors, meta={**merged.meta, "standings": standings, "fleet": fleet.meta()})

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

    def _kept(self, state: State) -> Callable[[float, Keep], Keep]:
        """What a device may keep at a ratio, of what it is allowed; all of that while no order of units is known."""
        order = order_of(state)
        if not order:
            return lambda ratio, allowed: allowed
        units = units_of(spec_of(state))
        return lambda ratio, allowed: order.keep(units, ratio, allowed)

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
            share=self.share,
            modest=min(self.min_rank, self.max_rank),
        )

    def _fleet(self, state: State) -> BanditState:
        arrays: Any = under("fleet", state.tensors)
        return BanditState.restore(arrays, state.meta["fleet"])

    def _evidence(self, state: State, round: int) -> Evidence | None:
        policy = self._policy()
        if not isinstance(policy, DiscountedUCB) or not policy.share:
            return None
        return policy.evidence(self._fleet(state), round)

    def _reward(self, median_drop: float = 1.0) -> Reward:
        return Reward(
            scale=self.loss_scale * max(median_drop, TINY_DROP),
            rho=self.rho,
            loss=self.reward_loss,
            progress=self.reward_progress,
            time=self.reward_time,
        )

    def _floor(self, round: int) -> float:
        return self.target * min(round / self.ramp, 1.0) ** 3

    def room(self, round: int) -> tuple[float, float]:
        """The least and the most that the schedule lets a device prune by this round, whatever its memory."""
        slow = self._floor(round)
        blind = self.masks == "fleet" and round <= 1  # nobody knows yet which units matter
        return slow, slow if blind else cubic(round, self.ramp, self.target)

    def _limits(
        self, need: Callable[[float, int], int], rank: int, report: DeviceReport, standing: Standing, round: int
    ) -> Limits:
        slow, fast = self.room(round)
        floor = max(standing.ratio, slow)
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
        standing, arm = self._standing(state, one.device), self._arm(one, need)
        bandit = self._policy().observe(standing.bandit, one.round, arm, reward, out_of_memory=one.out_of_memory)
        if one.out_of_memory:
            return replace(standing, bandit=bandit)
        return Standing(bandit=bandit, keep=one.keep, ratio=max(standing.ratio, arm.ratio))

    def _arm(self, one: Seen, need: Callable[[float, int], int]) -> Arm:
        ratio = min(one.ratio, self.target)
        return Arm(ratio=ratio, rank=one.rank, need=float(need(ratio, one.rank)))

    def _rewards(self, seen: Sequence[Seen]) -> list[float]:
        """Against the round's medians: losses fall less as a run goes on, whatever the arm."""
        sound = [one for one in seen if not one.out_of_memory]
        median = float(np.median([one.seconds for one in sound])) if sound else 0.0
        drops = [one.drop for one in sound if math.isfinite(one.drop)]
        reward = self._reward(float(np.median(drops)) if drops else 1.0)
        return [
            0.0
            if one.out_of_memory
            else reward(one.drop, min(one.ratio / self.target, 1.0), max(one.seconds, 1e-9), max(median, 1e-9))
            for one in seen
        ]


def order_of(state: State) -> UnitOrder:
    """The order in which the fleet's units go, as the last round left it."""
    arrays: Any = under("order", state.tensors)
    return UnitOrder.restore(arrays)


def reordered(state: State, seen: Sequence[Seen], target: float) -> UnitOrder:
    """The order after a round: gone as far as its most pruned device, and with what its devices measured."""
    units = units_of(spec_of(state))
    sound = [one for one in seen if not one.out_of_memory and one.examples]
    measured = [Measured(scores=one.scores, keep=one.keep, weight=float(one.examples)) for one in sound if one.scores]
    return order_of(state).advanced(units, [one.keep for one in sound], target).learned(units, measured)
