"""The allocator's knapsack: equal to an exact solver and to enumeration, and within its budgets."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from fedloom.strategies.knapsack import Choice, Setting, solve, solve_settings


def random_groups(rng, count, most, kind):
    """Groups whose first choice is free (rank 0); small integer costs, so that an LP solver's tolerance cannot tell."""
    groups = []
    for _ in range(count):
        score, width = rng.lognormal(), int(rng.integers(1, 40))
        choices = [Choice(0.0, 0, 0)] if kind != "base" else [Choice(-1.0, int(rng.integers(1, 9)), 1)]
        for c in range(1, int(rng.integers(2, most + 1))):
            if kind == "ranks":
                choices.append(Choice(score * math.sqrt(4 * c), 4 * c * width, width + 2 * c))
            elif kind == "linear":
                choices.append(Choice(float(width * c), 4 * c * width, width + 2 * c))
            else:
                choices.append(Choice(float(rng.normal()), int(rng.integers(0, 300)), int(rng.integers(0, 100))))
        groups.append(choices)
    return groups


def most_of(groups, cost):
    return sum(max(getattr(choice, cost) for choice in group) for group in groups)


def milp_value(groups, memory, seconds=None):
    flat = [choice for group in groups for choice in group]
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    rules = [LinearConstraint((owner[None] == np.arange(len(groups))[:, None]).astype(float), 1, 1)]
    for cost, budget in (("memory", memory), ("seconds", seconds)):
        if budget is not None:
            rules.append(LinearConstraint(np.array([[getattr(choice, cost) for choice in flat]]), -np.inf, budget))
    values = np.array([choice.value for choice in flat])
    found = milp(
        -values, constraints=rules, integrality=np.ones(len(flat)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0}
    )
    return None if found.x is None else -found.fun


def check(groups, solution, memory, seconds=None):
    chosen = [group[i] for group, i in zip(groups, solution.indices, strict=True)]
    assert solution.value == pytest.approx(sum(choice.value for choice in chosen), abs=1e-9)
    assert sum(math.ceil(choice.memory) for choice in chosen) == solution.memory <= memory
    assert solution.seconds == pytest.approx(sum(choice.seconds for choice in chosen), abs=1e-6)
    assert seconds is None or sum(choice.seconds for choice in chosen) <= seconds
    assert solution.exact


@pytest.mark.parametrize("kind", ["ranks", "linear", "free", "base"])
@pytest.mark.parametrize("timed", [False, True])
def test_it_equals_an_exact_solver(kind, timed):
    for seed in range(40):
        rng = np.random.default_rng([seed, len(kind)])
        groups = random_groups(rng, int(rng.integers(1, 16)), 8, kind)
        memory = int(most_of(groups, "memory") * rng.uniform(0.05, 0.9)) + 200 * (kind == "base")
        seconds = int(most_of(groups, "seconds") * rng.uniform(0.1, 0.9)) + 25 if timed else None
        best = milp_value(groups, memory, seconds)
        if best is None:
            with pytest.raises(ValueError, match="the smallest need"):
                solve(groups, memory, seconds)
            continue
        solution = solve(groups, memory, seconds)
        check(groups, solution, memory, seconds)
        assert solution.value == pytest.approx(best, abs=1e-6)


EIGHTHS = st.integers(-16, 16).map(lambda x: x / 8)  # whose sums are exact, so that ties are ties
CHOICES = st.builds(Choice, EIGHTHS, st.floats(0, 3).map(lambda x: round(x, 1)), st.floats(0, 2))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(CHOICES, min_size=1, max_size=4), max_size=5), st.floats(0, 12), st.none() | st.floats(0, 8))
def test_it_equals_enumeration_with_real_costs_and_ties(groups, memory, seconds):
    def key(chosen):
        worth = math.fsum(choice.value for choice in chosen)
        return worth, -sum(math.ceil(choice.memory) for choice in chosen)

    def nanos(choice):
        return math.ceil(round(choice.seconds * 1e9, 3))

    fitting = [
        chosen
        for chosen in itertools.product(*groups)
        if sum(math.ceil(choice.memory) for choice in chosen) <= memory
        and (seconds is None or sum(map(nanos, chosen)) <= math.floor(round(seconds * 1e9, 3)))
    ]
    if not fitting:
        with pytest.raises(ValueError, match="the smallest need"):
            solve(groups, memory, seconds)
        return
    best, solution = max(map(key, fitting)), solve(groups, memory, seconds)
    assert solution.exact
    assert (solution.value, -solution.memory) == best
    assert solution == solve(groups, memory, seconds)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_more_budget_is_never_worse(seed, small, more, timed):
    groups = random_groups(np.random.default_rng(seed), 12, 6, "free")
    memory, seconds = most_of(groups, "memory"), most_of(groups, "seconds")
    at = [small * memory, min(1.0, small + more) * memory]
    less, greater = (solve(groups, m, seconds * 0.5 if timed else None) for m in at)
    assert less.value <= greater.value + 1e-12
    if timed:
        slow = solve(groups, at[0], seconds * min(1.0, 0.5 + more))
        assert less.value <= slow.value + 1e-12


def test_of_equal_values_the_least_memory_then_seconds_then_the_first_wins():
    ties = [Choice(1.0, 5, 1.0), Choice(1.0, 3, 2.0), Choice(1.0, 3, 1.5), Choice(1.0, 3, 1.5), Choice(0.0, 0, 0.0)]
    assert solve([ties] * 3, 100).indices == (2, 2, 2)
    assert solve([ties] * 3, 100, 100.0).indices == (2, 2, 2)
    assert solve([ties] * 2, 6, 3.0).indices == (2, 2)


def test_the_order_of_groups_changes_only_the_order_of_the_answer():
    groups = random_groups(np.random.default_rng(3), 20, 6, "free")
    forth, back = solve(groups, 900, 400), solve(groups[::-1], 900, 400)
    assert forth.indices == back.indices[::-1]
    assert forth.value == pytest.approx(back.value, abs=1e-12)


def test_the_memory_of_a_real_model_is_met_to_the_byte():
    groups = [[Choice(0, 0), Choice(1 + g, 16 * (4096 + 11008) * 8 + 0.25)] for g in range(64)]
    budget = 10 * (16 * (4096 + 11008) * 8 + 1)
    assert sum(solve(groups, budget).indices) == 10
    assert sum(solve(groups, budget - 1).indices) == 9


def test_a_tenth_of_a_second_three_times_is_three_tenths():
    groups = [[Choice(0, 0), Choice(1, 0, 0.1)]] * 3
    assert solve(groups, 0, 0.3).indices == (1, 1, 1)


def test_what_cannot_fit_names_the_smallest_need():
    groups = [[Choice(1, 70, 9.0), Choice(1, 90, 1.0)], [Choice(0, 30, 1.0)]]
    with pytest.raises(ValueError, match=r"smallest need is 100 bytes of memory, over the budget of 99"):
        solve(groups, 99)
    with pytest.raises(ValueError, match=r"smallest need is 2 seconds, over the budget of 1\.5"):
        solve(groups, 200, 1.5)
    with pytest.raises(ValueError, match=r"smallest need within 2\.5 seconds is 120 bytes of memory, .* of 110"):
        solve(groups, 110, 2.5)
    settings_ = [Setting(groups=groups, memory=50), Setting(groups=groups, memory=20), Setting(groups=[], memory=500)]
    with pytest.raises(ValueError, match=r"smallest need is 120 bytes of memory, over the budget of 110"):
        solve_settings(settings_, 110)


@pytest.mark.parametrize(
    ("groups", "budgets", "message"),
    [
        ([[]], (1,), "group 0 must have at least one choice"),
        ([[Choice(math.nan, 1)]], (1,), "a value must be finite, got nan in group 0"),
        ([[Choice(1, -1)]], (1,), "a cost must be finite and >= 0, got -1 for memory in group 0"),
        ([[Choice(1, 1, math.inf)]], (1,), "a cost must be finite and >= 0, got inf for seconds"),
        ([[Choice(1, 2.0**62)]], (1,), r"a cost must be <= 2\*\*61"),
        ([[Choice(1, 2.0**60)]] * 3, (1,), r"all memory together must be <= 2\*\*61"),
        ([[Choice(1, 1)]], (-1,), "budgets must be >= 0, got -1 bytes"),
        ([[Choice(1, 1)]], (1, math.nan), "budgets must be >= 0, got 1 bytes and nan seconds"),
    ],
)
def test_nonsense_is_refused(groups, budgets, message):
    with pytest.raises(ValueError, match=message):
        solve(groups, *budgets)
    with pytest.raises(ValueError, match="at least one setting"):
        solve_settings([], 1)
    with pytest.raises(ValueError, match="max_states must be >= 1, got 0"):
        solve([], 1, max_states=0)


def test_settings_trade_bits_and_batches_against_adapters_as_enumeration_does():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        offers = []
        for bits, batch in itertools.product((16, 8, 4), (1, 4)):
            groups = [
                [Choice(0, 0), *(Choice(float(rng.uniform(0, 3)), 4 * c + 3 * batch, c) for c in range(1, 4))]
                for _ in range(5)
            ]
            offers.append(
                Setting(groups=groups, memory=10 * bits, seconds=2.0, value=bits / 16, time_factor=1 + 1 / batch)
            )
        memory, seconds = float(rng.uniform(50, 240)), float(rng.uniform(5, 40))
        worth = []
        for offer in offers:
            scaled = [
                [Choice(c.value, c.memory, c.seconds * offer.time_factor) for c in group] for group in offer.groups
            ]
            left = memory - offer.memory, seconds - 2 * offer.time_factor
            best = milp_value(scaled, *left) if min(left) >= 0 else None
            worth.append(-math.inf if best is None else best + offer.value)
        index, solution = solve_settings(offers, memory, seconds)
        assert solution.value == pytest.approx(max(worth), abs=1e-6)
        assert index == int(np.argmax(np.round(worth, 6)))
        assert solution.exact
        assert solution.memory <= memory
        assert solution.seconds <= seconds + 1e-9


def test_a_hard_instance_is_answered_with_a_bound_when_states_run_out():
    rng = np.random.default_rng(0)
    groups = [
        [Choice(0, 0)]
        + [Choice(float(rng.uniform()), int(rng.integers(1, 10**6)), float(rng.uniform())) for _ in range(5)]
        for _ in range(30)
    ]
    budgets = 5_000_000, 5.0
    exact, rough = solve(groups, *budgets, max_states=10**6), solve(groups, *budgets, max_states=5)
    assert exact.exact
    assert not rough.exact
    assert rough.value <= exact.value <= rough.bound
    assert rough.value > 0.97 * exact.value


def test_no_groups_and_no_choice_left():
    assert solve([], 0).indices == ()
    assert solve([[Choice(2, 3)]], 3).indices == (0,)
    assert solve([[Choice(-2, 3), Choice(-5, 0)]], math.inf).indices == (0,)
