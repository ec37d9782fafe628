"""Which (pruning ratio, rank) a device gets next: a discounted UCB over leaves that split as it learns.

FedSpine (Efficient Deployment of LLMs on Resource-constrained Devices) with the E-UCB of FedMP (Jiang et al., ICDE
2022). One bandit per device; P are leaves, disjoint boxes that cover [0, max ratio] x {1..max rank}; lambda < 1.

    N(P) = sum_s lambda^(t-s) 1{a_s in P}        R(P) = sum_s lambda^(t-s) 1{a_s in P} r_s / N(P)
    choose the leaf with the largest R(P) + c sqrt(2 ln sum_P N(P) / N(P)), an arm at random in it, and split it there
    until it is narrower than theta

Ours: a new leaf remembers its parent's mean as `prior` pseudo-observations (0: the paper's, where every empty leaf is
tried first, hundreds of rounds of it); a leaf splits once it holds `split_after` arms; c (1 in the paper) scales the
bonus to the noise of rewards in [0, 1]. Arms that do not fit the device are never chosen: each is drawn from the part
of its leaf that fits. After an out-of-memory report no arm that needs as much is chosen again.

Ours, too: devices may learn from one another. One bandit of the fleet (device "") observes every arm and owns the
leaves; a device adds to its own N(P) what the fleet saw there, a pull of another's counting `share` of its own and all
of them together `most` at the most. A new device then starts from what was good for the others, and its own pulls soon
outweigh that.

Everything drawn is a function of (seed, device, round), so a resumed run chooses as an uninterrupted one does.
`choose` changes nothing; `observe` returns the next state. Rewards are in [0, 1]
(bandit_reward.py). Legend: L leaves, n remembered arms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.seeds import derive_seed

Floats = NDArray[np.float64]
Need = Callable[[float, int], float]  # bytes that (ratio, rank) takes; falls with the ratio, grows with the rank

ARRAYS: Final = ("leaves", "rounds", "ratios", "ranks", "rewards")  # of a state
FORGET: Final = 1e-6  # arms of less weight than this are dropped
REMEMBERED: Final = 10_000  # arms that a bandit remembers at most, the newest
_STEPS: Final = 40  # bisections for the least ratio that fits


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a device is told to do: the share of units pruned, the adapter rank, and the bytes that this needs."""

    ratio: float
    rank: int
    need: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What fits a device this round: memory in bytes, and a ratio that only grows and may grow by so much."""

    need: Need = lambda ratio, rank: 0.0
    memory: float = math.inf
    ratio_floor: float = 0.0  # the device's current ratio: pruning is monotone
    ratio_ceiling: float = 1.0  # the most that a round may reach, for example by a schedule
    rank_ceiling: int = 2**31


@dataclass(frozen=True, kw_only=True)
class BanditState:
    """A bandit's whole state. `leaves` [L, 5]: ratio from, to, rank from, to (inclusive), prior mean (nan: none)."""

    device: str
    seed: int
    leaves: Floats
    rounds: NDArray[np.int64]  # [n], of the arms remembered
    ratios: Floats
    ranks: NDArray[np.int64]
    rewards: Floats
    memory_bound: float = math.inf  # bytes: what has run out of memory before

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays, for a checkpoint."""
        return {name: getattr(self, name) for name in ARRAYS}

    def meta(self) -> dict[str, Any]:
        """The rest, JSON-able."""
        bound = self.memory_bound if math.isfinite(self.memory_bound) else None
        return {"device": self.device, "seed": self.seed, "memory_bound": bound}

    @classmethod
    def restore(cls, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> BanditState:
        """The state that `tensors` and `meta` came from."""
        bound = math.inf if meta["memory_bound"] is None else float(meta["memory_bound"])
        return cls(device=meta["device"], seed=meta["seed"], memory_bound=bound, **dict(tensors))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a fleet knows as a round begins: its leaves [L, 5], and the discounted counts and means in them, [L]."""

    leaves: Floats
    counts: Floats
    means: Floats


class Policy(Protocol):
    """How arms are chosen; options in the object, everything learned in the state."""

    def init(self, device: str, seed: int) -> BanditState:
        """What a device's bandit knows at first."""
        ...

    def choose(self, state: BanditState, round: int, limits: Limits, fleet: Evidence | None = None) -> Arm:
        """An arm within the limits, the same for the same state and round, and for the same that the fleet knows.

        Raises:
            ValueError: when no arm fits, with the device and the smallest need.
        """
        ...

    def observe(
        self, state: BanditState, round: int, arm: Arm, reward: float, *, out_of_memory: bool = False
    ) -> BanditState:
        """The state after the arm chosen for `round` earned `reward` in [0, 1] (0 when it ran out of memory)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Box:
    """The arms: ratios in [0, max_ratio], ranks in 1..max_rank, whose widths are measured on a log scale."""

    max_ratio: float = 0.8
    max_rank: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.max_ratio <= 1 or self.max_rank < 1:
            raise ValueError(f"max_ratio must be in (0, 1] and max_rank >= 1, got {self.max_ratio} and {self.max_rank}")

    def whole(self) -> Floats:
        """The one leaf that covers everything."""
        return np.array([[0.0, self.max_ratio, 1.0, self.max_rank, math.nan]])

    def widths(self, leaf: Floats) -> tuple[float, float]:
        """A leaf's share of the ratios and of the log ranks; 0 for a single rank, which cannot be split."""
        ranks = 0.0 if leaf[2] == leaf[3] else math.log((leaf[3] + 1) / leaf[2]) / math.log(self.max_rank + 1)
        return (leaf[1] - leaf[0]) / self.max_ratio, ranks

    def split(self, leaf: Floats, arm: Arm, axis: int, mean: float) -> Floats:
        """Two leaves for one, [2, 5], at the arm but not nearer to an edge than a quarter of the leaf."""
        low, high = np.append(leaf[:4], mean), np.append(leaf[:4], mean)
        if axis == 0:
            quarter = (leaf[1] - leaf[0]) / 4
            low[1] = high[0] = min(max(arm.ratio, leaf[0] + quarter), leaf[1] - quarter)
        else:
            quarter = math.log((leaf[3] + 1) / leaf[2]) / 4
            at = math.exp(min(max(math.log(arm.rank), math.log(leaf[2]) + quarter), math.log(leaf[3] + 1) - quarter))
            low[3] = min(max(math.floor(at), leaf[2]), leaf[3] - 1)
            high[2] = low[3] + 1
        return np.stack([low, high])


def fresh(device: str, seed: int, leaves: Floats) -> BanditState:
    """A state with nothing observed."""
    none, whole = np.zeros(0), np.zeros(0, np.int64)
    return BanditState(device=device, seed=seed, leaves=leaves, rounds=whole, ratios=none, ranks=whole, rewards=none)


def uniforms(state: BanditState, round: int) -> tuple[float, float]:
    """Two draws from [0, 1): a function of seed, device and round, by Philox."""
    raw = np.random.Philox(key=derive_seed(state.seed, "bandit", state.device, round)).random_raw(2)
    return float(raw[0] >> np.uint64(11)) * 2.0**-53, float(raw[1] >> np.uint64(11)) * 2.0**-53


def fits(state: BanditState, limits: Limits, ratio: float, rank: int) -> bool:
    """Whether an arm is within the reported memory and below what has run out of memory before."""
    need = limits.need(ratio, rank)
    return need <= limits.memory and need < state.memory_bound


def corner(state: BanditState, limits: Limits, leaf: Floats) -> tuple[float, float, int, int] | None:
    """The part of a leaf that the limits leave, as ratio from, to, rank from, to; None when nothing of it fits.

    Its most frugal arm (highest ratio, lowest rank) fits, and every ratio in it fits with the lowest rank.
    """
    low, high = max(float(leaf[0]), limits.ratio_floor), min(float(leaf[1]), limits.ratio_ceiling)
    first, last = int(leaf[2]), min(int(leaf[3]), limits.rank_ceiling)
    if low > high or first > last or not fits(state, limits, high, first):
        return None
    if fits(state, limits, low, first):
        return low, high, first, last
    fitting = high
    for _ in range(_STEPS):
        middle = (low + fitting) / 2
        low, fitting = (low, middle) if fits(state, limits, middle, first) else (middle, fitting)
    return fitting, high, first, last


def draw(state: BanditState, limits: Limits, part: tuple[float, float, int, int], at: tuple[float, float]) -> Arm:
    """The arm at `at` in [0, 1)^2 of what `corner` left of a leaf: ratios evenly, then the log ranks that fit."""
    low, high, first, last = part
    ratio = low + at[0] * (high - low)
    if not fits(state, limits, ratio, first):
        ratio = high  # a need that does not fall with the ratio
    most, bad = first, last + 1
    if fits(state, limits, ratio, last):
        most = last
    while most < last and bad - most > 1:
        middle = (most + bad) // 2
        most, bad = (middle, bad) if fits(state, limits, ratio, middle) else (most, middle)
    rank = min(most, int(first * ((most + 1) / first) ** at[1]))
    if not fits(state, limits, ratio, rank):
        rank = first  # a need that does not grow with the rank
    return Arm(ratio=ratio, rank=rank, need=limits.need(ratio, rank))


def refuse(state: BanditState, limits: Limits, box: Box) -> ValueError:
    """The error when no arm fits: which device, its smallest need, and what it has."""
    high = min(box.max_ratio, limits.ratio_ceiling)
    if limits.ratio_floor > high or limits.rank_ceiling < 1:
        return ValueError(
            f"device {state.device} must have a ratio in [{limits.ratio_floor:g}, {high:g}] and a rank in "
            f"1..{limits.rank_ceiling}, got an empty range"
        )
    bound = f", and it ran out at {state.memory_bound:.12g}" if math.isfinite(state.memory_bound) else ""
    return ValueError(
        f"no arm fits device {state.device}: the smallest need, ratio {high:g} with rank 1, is "
        f"{limits.need(high, 1):.12g} bytes, its memory is {limits.memory:.12g}{bound}"
    )


def record(
    state: BanditState, round: int, arm: Arm, reward: float, out_of_memory: bool, discount: float
) -> BanditState:
    """The state with one more arm remembered, what weighs nothing forgotten, and the bound of memory learned."""
    if not 0 <= reward <= 1:
        raise ValueError(f"a reward must be in [0, 1], got {reward}")
    rounds = np.append(state.rounds, np.int64(round))
    keep = discount ** (rounds.max() - rounds).astype(np.float64) >= FORGET
    keep[:-REMEMBERED] = False
    return replace(
        state,
        rounds=rounds[keep],
        ratios=np.append(state.ratios, arm.ratio)[keep],
        ranks=np.append(state.ranks, np.int64(arm.rank))[keep],
        rewards=np.append(state.rewards, 0.0 if out_of_memory else reward)[keep],
        memory_bound=min(state.memory_bound, arm.need) if out_of_memory else state.memory_bound,
    )


@dataclass(frozen=True, kw_only=True)
class DiscountedUCB:
    """E-UCB over a tree of leaves; with `split` False, discounted UCB over the uniform grid of `cells`."""

    box: Box = field(default_factory=Box)
    discount: float = 0.98  # lambda: 1 never forgets
    exploration: float = 0.15  # c
    prior: float = 0.5  # pseudo-observations of the parent's mean; 0 is the paper's
    theta: float = 0.3  # share of an axis below which a leaf is not split
    split_after: int = 2
    cells: tuple[int, int] = (1, 1)  # ratios, log ranks, at first
    split: bool = True
    modest: int = 1  # ranks below it are for when no other fits
    share: float = 0.1  # what a pull of another device counts
    most: float = 2.0  # own pulls that all of the fleet's in a leaf count at most

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1 or not 0 < self.theta <= 1:
            raise ValueError(f"discount and theta must be in (0, 1], got {self.discount} and {self.theta}")
        if min(self.exploration, self.prior, self.most) < 0 or self.split_after < 1 or min(self.cells) < 1:
            raise ValueError("exploration, prior and most must be >= 0, split_after and cells >= 1, got " + repr(self))
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be in [0, 1], got {self.share}")

    def init(self, device: str, seed: int) -> BanditState:
        """The whole box as a grid of cells, nothing observed; a grid finer than the ranks has fewer columns."""
        ratios = np.linspace(0.0, self.box.max_ratio, self.cells[0] + 1)
        edges = np.unique(np.floor((self.box.max_rank + 1) ** np.linspace(0, 1, self.cells[1] + 1) + 1e-9))
        edges = np.unique(np.append(edges, min(self.modest, self.box.max_rank)))
        leaves = [
            [low, high, first, end - 1, math.nan] for low, high in pairwise(ratios) for first, end in pairwise(edges)
        ]
        return fresh(device, seed, np.array(leaves))

    def statistics(self, state: BanditState, round: int, leaves: Floats | None = None) -> tuple[Floats, Floats]:
        """Discounted counts N [L] and means R [L] as `round` begins, without the prior (mean 0 where N is 0).

        `leaves`: others than the state's own.
        """
        if len(state.rounds) and round < state.rounds.max():
            raise ValueError(f"round must be >= {state.rounds.max()}, the last one observed, got {round}")
        weights = self.discount ** (round - state.rounds).astype(np.float64)
        inside = self._inside(state.leaves if leaves is None else leaves, state.ratios, state.ranks)
        counts = inside @ weights
        sums = inside @ (weights * state.rewards)
        return counts, np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)

    def evidence(self, fleet: BanditState, round: int) -> Evidence:
        """What a fleet's bandit tells its devices as `round` begins."""
        counts, means = self.statistics(fleet, round)
        return Evidence(leaves=fleet.leaves, counts=counts, means=means)

    def _inside(self, leaves: Floats, ratios: Floats, ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which arm is in which leaf, [L, n]: ratios half open, but for the last."""
        low, high, first, last = (leaves[:, i, None] for i in range(4))
        top = (ratios < high) | (high == self.box.max_ratio)
        inside: NDArray[np.bool_] = (ratios >= low) & top & (ranks >= first) & (ranks <= last)
        return inside

    def indices(self, state: BanditState, round: int, fleet: Evidence | None = None) -> Floats:
        """The upper confidence bound of every leaf (the fleet's, if there is one), [L]; inf where nothing is known."""
        leaves = state.leaves if fleet is None else fleet.leaves
        counts, means = self.statistics(state, round, leaves)
        prior = np.where(np.isnan(leaves[:, 4]), 0.0, self.prior)
        others = np.zeros_like(counts) if fleet is None else np.minimum(self.share * fleet.counts, self.most)
        known = counts + others + prior
        total = counts * means + prior * np.nan_to_num(leaves[:, 4])
        total += 0.0 if fleet is None else others * fleet.means
        spread = 2 * math.log(max(float((counts + others).sum()), 1.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(known > 0, total / known + self.exploration * np.sqrt(spread / known), np.inf)

    def choose(self, state: BanditState, round: int, limits: Limits, fleet: Evidence | None = None) -> Arm:
        """An arm from the leaf of the largest bound among those of which a part fits; the first of equals.

        Leaves of ranks below `modest` come after all others.
        """
        bounds, leaves = self.indices(state, round, fleet), state.leaves if fleet is None else fleet.leaves
        for leaf in np.lexsort((-bounds, leaves[:, 3] < self.modest)):
            part = corner(state, limits, leaves[leaf])
            if part is not None:
                return draw(state, limits, part, uniforms(state, round))
        raise refuse(state, limits, self.box)

    def observe(
        self, state: BanditState, round: int, arm: Arm, reward: float, *, out_of_memory: bool = False
    ) -> BanditState:
        """Remember the arm, and split its leaf if that is wide and full enough."""
        if not (0 <= arm.ratio <= self.box.max_ratio and 1 <= arm.rank <= self.box.max_rank):
            raise ValueError(f"an arm must be in the box {self.box}, got {arm}")
        state = record(state, round, arm, reward, out_of_memory, self.discount)
        inside = self._inside(state.leaves, state.ratios, state.ranks)
        at = int(self._inside(state.leaves, np.array([arm.ratio]), np.array([arm.rank])).argmax())
        widths = self.box.widths(state.leaves[at])
        if not self.split or max(widths) <= self.theta or inside[at].sum() < self.split_after:
            return state
        counts, means = self.statistics(state, int(state.rounds.max()))
        prior = 0.0 if math.isnan(state.leaves[at, 4]) else self.prior
        mean = (counts[at] * means[at] + prior * np.nan_to_num(state.leaves[at, 4])) / (counts[at] + prior)
        pair = self.box.split(state.leaves[at], arm, int(widths[1] > widths[0]), mean)
        return replace(state, leaves=np.concatenate([state.leaves[:at], pair, state.leaves[at + 1 :]]))
