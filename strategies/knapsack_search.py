"""The core of knapsack.py: bounds by multipliers, a greedy start, and the dynamic programme over Pareto fronts.

Costs are what a choice needs above the group's cheapest, so that prices times budgets stay of the size of the values
and a bound loses nothing to cancellation.

Legend: G groups, C choices of the largest group, K states; costs are int64 (bytes and nanoseconds), values float64.
`loss` [G, C] is what a choice costs against the bound L; it is 0 at `start` [G] and inf at padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LARGEST: Final = 2**61  # of a sum of costs, and the budget that stands for none
_SLACK: Final = 1e-12  # relative, of the values: what rounding may do to a bound
_BLOCK: Final = 256
_STEPS: Final = 30  # bisections for a multiplier: 1e-9 of its range
_WARM_UP: Final = (100, 2000)  # states of first passes, which mostly find the optimum, so that the last can prune


@dataclass(frozen=True, slots=True)
class Grid:
    """Values (-inf at padding) and costs of every choice, [G, C], and the budgets: bytes and nanoseconds."""

    value: Floats
    memory: Integers
    seconds: Integers
    budget: tuple[int, int]

    def totals(self, choices: Integers) -> tuple[float, int, int]:
        """Value, bytes and nanoseconds of a choice of each group."""
        rows = np.arange(len(choices))
        worth = math.fsum(self.value[rows, choices].tolist())
        return worth, int(self.memory[rows, choices].sum()), int(self.seconds[rows, choices].sum())

    def fits(self, choices: Integers) -> bool:
        """Whether both budgets hold."""
        _, memory, seconds = self.totals(choices)
        return memory <= self.budget[0] and seconds <= self.budget[1]


def cheap(grid: Grid) -> Integers | None:
    """A solution within both budgets by trying mixtures of the two costs; None when none of them is."""
    memory, seconds = grid.memory / max(grid.budget[0], 1), grid.seconds / max(grid.budget[1], 1)
    for share in (0.5, 1.0, 0.0, 0.75, 0.25, 0.9, 0.1):
        cost = np.where(np.isfinite(grid.value), share * memory + (1 - share) * seconds, np.inf)
        choices: Integers = cost.argmin(1)
        if grid.fits(choices):
            return choices
    return None


def optimum(
    grid: Grid, start: Integers, loss: Floats, first: Integers, bound: float, most: int
) -> tuple[Integers, float]:
    """The best choices from the feasible `first` on, and the bound of what was given up (-inf: nothing was)."""
    choices, dropped = improve(grid, first), math.inf
    for room in sorted({min(limit, most) for limit in (*_WARM_UP, most)}):
        if dropped > -math.inf:
            choices, dropped = _search(grid, start, loss, choices, bound, room)
    return choices, dropped


@dataclass(frozen=True, slots=True)
class _States:
    """Totals of K states, whose groups not freed yet stand at the start, and how each was reached."""

    memory: Integers
    seconds: Integers
    value: Floats
    loss: Floats
    parent: Integers
    choice: Integers

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> _States:
        return _States(*(getattr(self, name)[index] for name in _States.__slots__))


def multipliers(grid: Grid) -> tuple[float, float]:
    """Prices of a byte and of a nanosecond near the least L; the bound holds for any, and prunes best for these."""
    if grid.budget[1] >= int(grid.seconds.max(1).sum()):
        return _price(grid, 0.0)[0], 0.0
    low, high = 0.0, float(np.ptp(grid.value[np.isfinite(grid.value)])) / max(grid.budget[1], 1) + 1e-300
    while _slope(grid, high) < 0 and high < 1e200:
        low, high = high, high * 4
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(grid, middle) < 0 else (low, middle)
    return _price(grid, high)[0], high


def _price(grid: Grid, z: float) -> tuple[float, Integers, Integers, float]:
    """The price y of a byte that minimises L(y, z), the choices just below and above it, and the weight of the lower.

    The weight mixes the memory of the two to the budget exactly.
    """
    rows, base, budget = np.arange(len(grid.value)), grid.value - z * grid.seconds, grid.budget[0]

    def at(y: float) -> tuple[Integers, int]:
        choices = (base - y * grid.memory).argmax(1)
        return choices, int(grid.memory[rows, choices].sum())

    below, used = at(0.0)
    if used <= budget:
        return 0.0, below, below, 1.0
    low, high = 0.0, float(np.ptp(grid.value[np.isfinite(grid.value)])) / max(budget, 1) + 1e-300
    above, less = at(high)
    while less > budget and high < 1e200:
        (low, below, used), high = (high, above, less), high * 4
        above, less = at(high)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        choices, memory = at(middle)
        if memory > budget:
            low, below, used = middle, choices, memory
        else:
            high, above, less = middle, choices, memory
    return high, below, above, (budget - less) / max(used - less, 1)


def _slope(grid: Grid, z: float) -> float:
    """d/dz of min over y of L(y, z): the time left by the mixture of choices that uses all the memory."""
    _, below, above, share = _price(grid, z)
    rows = np.arange(len(grid.value))
    used = share * grid.seconds[rows, below].sum() + (1 - share) * grid.seconds[rows, above].sum()
    return float(grid.budget[1] - used)


def relax(grid: Grid, y: float, z: float) -> tuple[float, Integers, Floats]:
    """L(y, z) and what rounding may take from it, each group's choice [G], and the losses [G, C] (inf at padding)."""
    paid = grid.value - y * grid.memory - z * grid.seconds
    most = paid.max(1)
    prices = [y * grid.budget[0] if y else 0.0, z * grid.budget[1] if z else 0.0]
    size = math.fsum([*prices, *np.abs(np.where(np.isfinite(grid.value), grid.value, 0.0)).max(1).tolist()])
    return math.fsum([*prices, *most.tolist()]) + _SLACK * size, paid.argmax(1), most[:, None] - paid


def improve(grid: Grid, choices: Integers) -> Integers:
    """Swap single choices for the best that still fit, until none is worth more."""
    rows, choices = np.arange(len(choices)), choices.copy()
    memory_left = grid.budget[0] - int(grid.memory[rows, choices].sum())
    seconds_left = grid.budget[1] - int(grid.seconds[rows, choices].sum())
    for _ in range(10 * len(choices)):
        memory = grid.memory - grid.memory[rows, choices][:, None]
        seconds = grid.seconds - grid.seconds[rows, choices][:, None]
        gain = grid.value - grid.value[rows, choices][:, None]
        gain = np.where((memory <= memory_left) & (seconds <= seconds_left), gain, -np.inf)
        g, c = divmod(int(gain.argmax()), gain.shape[1])
        if not gain[g, c] > 0:
            break
        memory_left, seconds_left, choices[g] = memory_left - memory[g, c], seconds_left - seconds[g, c], c
    return choices


def _search(
    grid: Grid, start: Integers, loss: Floats, first: Integers, bound: float, max_states: int
) -> tuple[Integers, float]:
    """The best choices, and the bound of what was given up for want of room (-inf when nothing was)."""
    rows, dropped, layers = np.arange(len(start)), -math.inf, []
    best = grid.totals(first)[0]
    gap = bound - best
    second = np.partition(loss, 1, axis=1)[:, 1] if loss.shape[1] > 1 else np.full(len(start), np.inf)
    order = [g for g in np.argsort(second, kind="stable").tolist() if second[g] <= gap]
    change = [costs - costs[rows, start][:, None] for costs in (grid.memory, grid.seconds)]
    least = [np.where(loss <= gap, costs, 0).min(1)[order] for costs in change]
    ahead = [np.append(np.cumsum(costs[::-1])[::-1], 0) for costs in least]  # the most that groups to come can save
    totals = [int(costs[rows, start].sum()) for costs in (grid.memory, grid.seconds)]
    worth, none = np.array([grid.value[rows, start].sum()]), np.zeros(1, np.int64)
    states = _States(none + totals[0], none + totals[1], worth, np.zeros(1), none, none)
    for i, g in enumerate(order):
        kept = np.flatnonzero(loss[g] <= gap)
        if len(kept) == 1:
            continue
        states = _expand(states, grid, g, start[g], kept, loss[g])
        room = (states.memory + ahead[0][i + 1] <= grid.budget[0]) & (
            states.seconds + ahead[1][i + 1] <= grid.budget[1]
        )
        states = states.take(room & (states.loss <= gap))
        whole = (states.memory <= grid.budget[0]) & (states.seconds <= grid.budget[1])
        best = max(best, float(states.value[whole].max(initial=-np.inf)))
        gap = bound - best
        states = states.take(states.loss <= gap)
        states = states.take(_pareto(states, grid.budget[1] < LARGEST))
        if len(states.value) > max_states:
            ranked = np.argsort(states.loss, kind="stable")
            dropped = max(dropped, bound - float(states.loss[ranked[max_states]]))
            states = states.take(np.sort(ranked[:max_states]))
        layers.append((g, states.parent, states.choice))
    return _trace(grid, states, layers, start, first), dropped


def _expand(states: _States, grid: Grid, g: int, start: int, kept: Integers, loss: Floats) -> _States:
    """Every state with every kept choice of group g in place of the starting one."""
    count = len(states.value)
    parent, choice = np.repeat(np.arange(count), len(kept)), np.tile(kept, count)
    return _States(
        memory=states.memory[parent] + (grid.memory[g, choice] - grid.memory[g, start]),
        seconds=states.seconds[parent] + (grid.seconds[g, choice] - grid.seconds[g, start]),
        value=states.value[parent] + (grid.value[g, choice] - grid.value[g, start]),
        loss=states.loss[parent] + loss[choice],
        parent=parent,
        choice=choice,
    )


def _pareto(states: _States, timed: bool) -> NDArray[np.intp]:
    """The states that no other matches in all of memory, seconds (when timed) and value; of equals, the first."""
    order = np.lexsort((states.seconds, -states.value, states.memory))
    value = states.value[order]
    if not timed:
        before = np.concatenate(([-np.inf], np.maximum.accumulate(value)[:-1]))
        return order[value > before]
    return order[_undominated(states.seconds[order], value)]


def _undominated(seconds: Integers, value: Floats) -> NDArray[np.bool_]:
    """Which points no earlier one matches (as few seconds, as much value); a staircase of the best value by seconds."""
    keep = np.zeros(len(value), np.bool_)
    stair_seconds, stair_value = np.array([-1], np.int64), np.array([-np.inf])
    for begin in range(0, len(value), _BLOCK):
        s, v = seconds[begin : begin + _BLOCK], value[begin : begin + _BLOCK]
        alive = stair_value[np.searchsorted(stair_seconds, s, side="right") - 1] < v
        live = np.flatnonzero(alive)
        s, v = s[live], v[live]
        beaten = np.tril((s[None, :] <= s[:, None]) & (v[None, :] >= v[:, None]), -1).any(1)
        keep[begin + live[~beaten]] = True
        merged = np.concatenate((stair_seconds, s[~beaten])), np.concatenate((stair_value, v[~beaten]))
        order = np.lexsort((-merged[1], merged[0]))
        stair_seconds, stair_value = merged[0][order], np.maximum.accumulate(merged[1][order])
        rising = np.concatenate(([True], stair_value[1:] > stair_value[:-1]))
        stair_seconds, stair_value = stair_seconds[rising], stair_value[rising]
    return keep


def _trace(
    grid: Grid,
    states: _States,
    layers: Sequence[tuple[int, Integers, Integers]],
    start: Integers,
    first: Integers,
) -> Integers:
    """The choices of the best state within the budgets (most value, least memory, least seconds), or `first`."""
    fits = np.flatnonzero((states.memory <= grid.budget[0]) & (states.seconds <= grid.budget[1]))
    choices = start.copy()
    if not len(fits):
        return first
    found = states.take(fits)
    at = int(fits[np.lexsort((found.seconds, found.memory, -found.value))[0]])
    for g, parent, choice in reversed(layers):
        choices[g], at = choice[at], parent[at]
    return first if grid.totals(first)[0] > grid.totals(choices)[0] else choices
