"""Exact multiple-choice knapsack under one or two budgets: which module gets which adapter rank on one device.

The problem is FedPipe's allocation (automated federated pipeline for PEFT); the method is the core dynamic programme
of Pisinger (A minimal algorithm for the multiple-choice knapsack problem, EJOR 1995), extended to a second budget.

    maximise sum_g v[g, c_g]    subject to    sum_g m[g, c_g] <= M,    sum_g s[g, c_g] <= T
    L(y, z) = y M + z T + sum_g max_c (v - y m - z s)                  an upper bound for every y, z >= 0
    loss[g, c] = max_c' (v - y m - z s)[g, c'] - (v - y m - z s)[g, c]  what choosing c costs against that bound

Every group starts at the choice of loss 0; groups are freed one by one, those whose second choice costs least first. A
state is the totals (m, s, v) of one assignment of the groups freed so far. It is dropped when another state is no
worse in all three, or when L - (its losses) is below the best solution known: no optimum is lost by either.

What is exact: memory is rounded up to whole bytes and seconds up to whole nanoseconds, budgets down, and both are
summed as 64-bit integers, so a budget is never broken, not by a rounding error either. On that grid the answer is an
optimum, up to the rounding of float64 sums of values (relative 1e-12). The problem is NP-hard: should more than
`max_states` states survive, the least promising go, and `Solution.bound` says how much better an optimum could be.

Legend: G groups, C choices of the largest group (shorter groups padded with value -inf), K states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from fedloom.strategies.knapsack_search import LARGEST, Grid, Integers, cheap, multipliers, optimum, relax

NANO: Final = 1_000_000_000
STATES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of a group: what it is worth (any unit), and its cost in bytes and in seconds."""

    value: float
    memory: float
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One global choice, for example a batch size and the bits of the base, with the costs that it brings.

    `memory` (bytes), `seconds` and `value` are what it adds whatever the groups choose; `time_factor` multiplies its
    own seconds and those of all groups. Costs of modules under it are those in `groups`.
    """

    groups: Sequence[Sequence[Choice]]
    memory: float = 0.0
    seconds: float = 0.0
    value: float = 0.0
    time_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Which choice each group takes, the totals, and the proof: no solution is worth more than `bound`."""

    indices: tuple[int, ...]
    value: float
    memory: int  # bytes
    seconds: float
    bound: float

    @property
    def exact(self) -> bool:
        """Whether this is proven to be an optimum."""
        return self.bound <= self.value


def solve(
    groups: Sequence[Sequence[Choice]],
    memory_budget: float,
    seconds_budget: float | None = None,
    *,
    max_states: int = STATES,
) -> Solution:
    """One choice of each group, worth the most within the budgets; of equal values, the least memory, then seconds.

    Raises:
        ValueError: for an empty group, a cost that is negative or not finite, or budgets below the smallest need,
            which the message names.
    """
    return solve_settings([Setting(groups=groups)], memory_budget, seconds_budget, max_states=max_states)[1]


def solve_settings(
    settings: Sequence[Setting],
    memory_budget: float,
    seconds_budget: float | None = None,
    *,
    max_states: int = STATES,
) -> tuple[int, Solution]:
    """The best setting (the first of equals) and the choices under it; totals include what the setting adds.

    Raises:
        ValueError: as `solve`; when no setting fits, the message names the smallest need of all.
    """
    if not settings:
        raise ValueError("there must be at least one setting, got none")
    if not memory_budget >= 0 or (seconds_budget is not None and not seconds_budget >= 0):
        raise ValueError(f"budgets must be >= 0, got {memory_budget} bytes and {seconds_budget} seconds")
    if max_states < 1:
        raise ValueError(f"max_states must be >= 1, got {max_states}")
    problems = [_Problem.of(setting, memory_budget, seconds_budget) for setting in settings]
    best: tuple[int, Solution] | None = None
    bound, refusals = -math.inf, []
    for i, problem in enumerate(problems):
        try:
            found = problem.solve(best[1].value if best else -math.inf, max_states)
        except _InfeasibleError as error:
            refusals.append(error)
            continue
        if found is None:
            continue
        bound = max(bound, found.bound)
        if best is None or found.value > best[1].value:
            best = (i, found)
    if best is None:
        raise ValueError(str(min(refusals, key=lambda error: error.excess)))
    index, answer = best
    return index, replace(answer, bound=max(bound, answer.value))


class _InfeasibleError(Exception):
    """Budgets below the need, and how many times."""

    def __init__(self, message: str, excess: float) -> None:
        super().__init__(message)
        self.excess = excess


@dataclass(frozen=True, slots=True)
class _Problem:
    """One setting: what is left to choose, above the least that it needs: its own costs and each group's cheapest."""

    grid: Grid
    value: float
    memory: int  # bytes of that least
    seconds: int  # nanoseconds of it

    @classmethod
    def of(cls, setting: Setting, memory_budget: float, seconds_budget: float | None) -> _Problem:
        """Check, round costs up and budgets down, and pad."""
        groups, factor = setting.groups, setting.time_factor
        for g, group in enumerate(groups):
            if not group:
                raise ValueError(f"group {g} must have at least one choice, got none")
        shape = (len(groups), max((len(group) for group in groups), default=1))
        value, memory, seconds = np.full(shape, -np.inf), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for g, group in enumerate(groups):
            for c, choice in enumerate(group):
                value[g, c] = _finite(choice.value, f"group {g}")
                memory[g, c] = _up(choice.memory, 1, f"memory in group {g}")
                seconds[g, c] = _up(choice.seconds * factor, NANO, f"seconds in group {g}")
        own = _up(setting.memory, 1, "memory of a setting"), _up(setting.seconds * factor, NANO, "time of a setting")
        for what, costs, fixed in (("memory", memory, own[0]), ("seconds", seconds, own[1])):
            if math.fsum(costs.max(1, initial=0).tolist()) + fixed > LARGEST:
                raise ValueError(f"all {what} together must be <= 2**61 bytes or nanoseconds, got more")
        known = np.isfinite(value)
        cheapest = [np.where(known, costs, LARGEST).min(1) for costs in (memory, seconds)]
        memory, seconds = (
            np.where(known, costs - least[:, None], 0) for costs, least in zip((memory, seconds), cheapest, strict=True)
        )
        needs = own[0] + int(cheapest[0].sum()), own[1] + int(cheapest[1].sum())
        budget = _left(_down(memory_budget, 1), needs[0]), _left(_down(seconds_budget, NANO), needs[1])
        return cls(Grid(value, memory, seconds, budget), _finite(setting.value, "a setting"), *needs)

    def solve(self, floor: float, max_states: int) -> Solution | None:
        """The optimum; None when it cannot be worth more than `floor`."""
        grid = self.grid
        self._refuse_above(0, 0)
        if not len(grid.value):
            return self._answer(np.zeros(0, np.int64), -math.inf)
        bound, start, loss = relax(grid, *multipliers(grid))
        if bound + self.value < floor:
            return None
        first = start if grid.fits(start) else cheap(grid)
        if first is None:
            first = self._frugal(max_states)
        choices, dropped = optimum(grid, start, loss, first, bound, max_states)
        return self._answer(choices, dropped)

    def _answer(self, choices: Integers, dropped: float) -> Solution:
        value, memory, seconds = self.grid.totals(choices)
        return Solution(
            indices=tuple(choices.tolist()),
            value=value + self.value,
            memory=memory + self.memory,
            seconds=(seconds + self.seconds) / NANO,
            bound=max(value, dropped) + self.value,
        )

    def _frugal(self, max_states: int) -> Integers:
        """The choices of the least memory within the time: itself a knapsack of one budget."""
        grid = self.grid
        value = np.where(np.isfinite(grid.value), -grid.memory.astype(np.float64), -np.inf)
        easy = _Problem(Grid(value, grid.memory, grid.seconds, (LARGEST, grid.budget[1])), 0.0, 0, 0)
        found = easy.solve(-math.inf, max(max_states, STATES))
        if found is None:
            raise ValueError("the least time must fit its own budget, got no choices")
        self._refuse_above(found.memory, 0, f" within {(grid.budget[1] + self.seconds) / NANO:g} seconds")
        return np.array(found.indices, np.int64)

    def _refuse_above(self, memory: int, seconds: int, within: str = "") -> None:
        """Refuse when the least bytes or nanoseconds that the groups need are over budget."""
        for need, budget, own, unit, name in (
            (memory, self.grid.budget[0], self.memory, 1, "bytes of memory"),
            (seconds, self.grid.budget[1], self.seconds, NANO, "seconds"),
        ):
            if need > budget:
                total, whole = (need + own) / unit, (budget + own) / unit
                text = f"the smallest need{within} is {total:.12g} {name}, over the budget of {whole:.12g}"
                raise _InfeasibleError(text, total / whole if whole else math.inf)


def _left(budget: int, need: int) -> int:
    return budget if budget == LARGEST else budget - need


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a value must be finite, got {value} in {where}")
    return value


def _up(cost: float, unit: int, what: str) -> int:
    """Rounded up to the grid; of nanoseconds, less than a thousandth is taken for float rounding, not cost."""
    if not (math.isfinite(cost) and cost >= 0):
        raise ValueError(f"a cost must be finite and >= 0, got {cost} for {what}")
    if cost * unit > LARGEST:
        raise ValueError(f"a cost must be <= 2**61 bytes or nanoseconds, got {cost} for {what}")
    return math.ceil(cost) if unit == 1 else math.ceil(round(cost * unit, 3))


def _down(budget: float | None, unit: int) -> int:
    if budget is None or budget * unit >= LARGEST:
        return LARGEST
    return math.floor(budget) if unit == 1 else math.floor(round(budget * unit, 3))
