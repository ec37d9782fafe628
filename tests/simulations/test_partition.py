"""Partitions: every index dealt once, nobody short, the same seed the same deal, and alpha doing what it says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.simulations.partition import by_key, dirichlet, iid, quantity

Deal = Callable[[int, int, float, np.random.Generator], list[list[int]]]


def _labels(count: int, kinds: int = 4) -> list[str]:
    return [f"label-{index % kinds}" for index in range(count)]


DEALS: dict[str, Deal] = {
    "iid": lambda count, devices, alpha, generator: iid(count, devices, generator),
    "dirichlet": lambda count, devices, alpha, generator: dirichlet(_labels(count), devices, alpha, generator),
    "quantity": lambda count, devices, alpha, generator: quantity(count, devices, alpha, generator),
}
alphas = st.floats(min_value=1e-4, max_value=1e4)


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


@pytest.mark.parametrize("name", DEALS)
@settings(deadline=None)
@given(devices=st.integers(1, 12), extra=st.integers(0, 60), alpha=alphas, seed=st.integers(0, 2**32))
def test_every_index_is_dealt_once_and_nobody_is_short(
    name: str, devices: int, extra: int, alpha: float, seed: int
) -> None:
    count = 2 * devices + extra
    deal = DEALS[name](count, devices, alpha, _generator(seed))
    assert len(deal) == devices
    assert sorted(index for indices in deal for index in indices) == list(range(count))
    assert min(len(indices) for indices in deal) >= 2
    assert all(type(index) is int for indices in deal for index in indices)
    assert deal == DEALS[name](count, devices, alpha, _generator(seed))


@pytest.mark.parametrize("name", DEALS)
def test_another_seed_deals_differently(name: str) -> None:
    assert DEALS[name](60, 5, 0.5, _generator(1)) != DEALS[name](60, 5, 0.5, _generator(2))


@pytest.mark.parametrize("name", DEALS)
def test_too_few_examples_is_an_error_that_says_how_many_are_needed(name: str) -> None:
    with pytest.raises(ValueError, match=r"over 5 devices needs at least 10 examples \(2 for each device\), got 9"):
        DEALS[name](9, 5, 0.5, _generator(0))


@pytest.mark.parametrize("name", ["dirichlet", "quantity"])
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive_and_finite(name: str, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha must be positive and finite, got {alpha}"):
        DEALS[name](60, 5, alpha, _generator(0))


@pytest.mark.parametrize("name", DEALS)
def test_there_must_be_a_device(name: str) -> None:
    with pytest.raises(ValueError, match="devices must be >= 1, got 0"):
        DEALS[name](60, 0, 0.5, _generator(0))


@settings(deadline=None)
@given(devices=st.integers(1, 8), least=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_quantity_leaves_everybody_at_least_what_was_asked(devices: int, least: int, seed: int) -> None:
    deal = quantity(max(1, least * devices), devices, 0.01, _generator(seed), least=least)
    assert min(len(indices) for indices in deal) >= least


def test_sizes_are_even_for_iid_and_for_labels() -> None:
    for name in ("iid", "dirichlet"):
        sizes = [len(indices) for indices in DEALS[name](103, 10, 0.1, _generator(3))]
        assert sorted(sizes) == [10] * 7 + [11] * 3, name


def _label_skew(deal: list[list[int]], labels: list[str]) -> float:
    """Mean total variation distance between a device's labels and everybody's; 0 for alike, towards 1 for one label."""
    names = sorted(set(labels))
    whole = np.array([labels.count(name) for name in names]) / len(labels)
    shares = [np.array([[labels[i] for i in indices].count(name) for name in names]) / len(indices) for indices in deal]
    return float(np.mean([np.abs(share - whole).sum() / 2 for share in shares]))


def test_a_smaller_alpha_skews_labels_more() -> None:
    labels = _labels(800, kinds=8)
    skews = [
        float(np.mean([_label_skew(dirichlet(labels, 16, alpha, _generator(seed)), labels) for seed in range(5)]))
        for alpha in (0.1, 1.0, 10.0, 1e6)
    ]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.6
    assert skews[-1] < 0.2


def test_a_large_alpha_follows_unequal_label_shares() -> None:
    labels = ["rare"] * 100 + ["often"] * 900
    deal = dirichlet(labels, 4, 1e6, _generator(0))
    rare = [sum(labels[index] == "rare" for index in indices) for indices in deal]
    assert sum(rare) == 100
    assert all(12 <= count <= 38 for count in rare)  # 25 each, within about 2.7 standard deviations of a binomial


def test_a_smaller_alpha_spreads_amounts_more() -> None:
    spreads = [
        np.std([len(indices) for seed in range(5) for indices in quantity(1000, 10, alpha, _generator(seed))])
        for alpha in (0.1, 1.0, 10.0, 1e6)
    ]
    assert list(spreads) == sorted(spreads, reverse=True)
    assert spreads[-1] < 2


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdef"), max_size=60), st.integers(1, 6))
def test_by_key_gives_each_device_all_of_one_owner_the_largest_first(owners: list[str], devices: int) -> None:
    able = [owner for owner in set(owners) if owners.count(owner) >= 2]
    if len(able) < devices:
        with pytest.raises(ValueError, match=f"got {len(able)} such owners of {len(set(owners))}"):
            by_key(owners, devices)
        return
    deal = by_key(owners, devices)
    expected = sorted(able, key=lambda owner: (-owners.count(owner), owner))[:devices]
    assert deal == [[index for index, owner in enumerate(owners) if owner == name] for name in expected]


def test_by_key_breaks_ties_by_name_and_leaves_small_owners_out() -> None:
    owners = ["zoe", "amy", "amy", "zoe", "bob", "cat", "cat", "cat"]
    assert by_key(owners, 3) == [[5, 6, 7], [1, 2], [0, 3]]
    assert by_key(owners, 4, least=1)[3] == [4]
    with pytest.raises(ValueError, match="at least 2 examples for each of 4 devices, got 3 such owners of 4"):
        by_key(owners, 4)
