"""Pooling: sums of sums are what one evaluation over everybody gives, and intervals behave as intervals do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.server.pooling import interval, pool


def _device(hits: list[int], tokens: list[int], losses: list[float]) -> dict[str, float]:
    """What a device reports for examples with these exact matches, token counts and summed losses."""
    return {
        "n": float(len(hits)),
        "tokens": float(sum(tokens)),
        "loss_sum": float(sum(losses)),
        "exact_match_sum": float(sum(hits)),
        "token_hits": float(sum(token for token, hit in zip(tokens, hits, strict=True) if hit)),
    }


def _fleet(devices: int, seed: int = 0) -> list[dict[str, float]]:
    """Devices of 20 to 40 examples whose own accuracy differs."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    fleet = []
    for _ in range(devices):
        count, rate = int(generator.integers(20, 41)), generator.uniform(0.4, 0.9)
        hits = (generator.random(count) < rate).astype(int).tolist()
        tokens = generator.integers(5, 20, count).tolist()
        fleet.append(_device(hits, tokens, generator.uniform(0, 30, count).tolist()))
    return fleet


examples = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 50), st.floats(0, 1e3)), min_size=1, max_size=10)


@settings(deadline=None)
@given(st.lists(examples, min_size=1, max_size=6))
def test_pooled_means_are_those_of_one_evaluation_over_everybody(devices: list[list[tuple[int, int, float]]]) -> None:
    reports = [_device(*(list(column) for column in zip(*device, strict=True))) for device in devices]  # type: ignore[arg-type]
    everybody = [example for device in devices for example in device]
    tokens = sum(count for _, count, _ in everybody)
    pooled = pool(reports)
    assert pooled["exact_match"] == pytest.approx(sum(hit for hit, _, _ in everybody) / len(everybody))
    assert pooled["loss"] == pytest.approx(sum(loss for _, _, loss in everybody) / tokens)
    assert pooled["token_accuracy"] == pytest.approx(sum(count for hit, count, _ in everybody if hit) / tokens)
    assert pool(list(reversed(reports))) == pytest.approx(pooled)


def test_a_device_counts_by_its_examples() -> None:
    small, large = _device([1], [4], [1.0]), _device([0] * 9, [4] * 9, [3.0] * 9)
    assert pool([small, large])["exact_match"] == pytest.approx(0.1)
    assert pool([small, large])["loss"] == pytest.approx((1 + 27) / 40)


def test_nothing_to_pool() -> None:
    assert pool([]) == {}
    assert pool([{"n": 0.0, "exact_match_sum": 0.0}])["exact_match"] == 0.0
    assert interval([], "exact_match", seed=0) == [0.0, 0.0]


@pytest.mark.parametrize("metric", ["exact_match", "loss", "token_accuracy"])
@pytest.mark.parametrize("seed", range(5))
def test_an_interval_contains_the_pooled_value(metric: str, seed: int) -> None:
    fleet = _fleet(12, seed)
    low, high = interval(fleet, metric, seed=seed)
    assert low < pool(fleet)[metric] < high


@pytest.mark.parametrize("metric", ["exact_match", "loss"])
def test_an_interval_narrows_as_one_over_the_root_of_the_number_of_devices(metric: str) -> None:
    few, many = (interval(_fleet(25) * copies, metric, seed=0) for copies in (1, 16))
    assert (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(math.sqrt(16), rel=0.15)


def test_a_smaller_share_gives_a_narrower_interval_inside() -> None:
    wide, narrow = (interval(_fleet(10), "exact_match", seed=0, share=share) for share in (0.95, 0.5))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_an_interval_of_equal_devices_matches_the_binomial() -> None:
    """Devices of one example each: the bootstrap's spread is that of a binomial share."""
    hits = [1] * 140 + [0] * 60
    low, high = interval([_device([hit], [1], [1.0]) for hit in hits], "exact_match", seed=1)
    deviation = math.sqrt(0.7 * 0.3 / 200)
    assert low == pytest.approx(0.7 - 1.96 * deviation, abs=0.015)
    assert high == pytest.approx(0.7 + 1.96 * deviation, abs=0.015)


def test_a_single_device_has_no_spread() -> None:
    device = _device([1, 0, 1, 1], [3, 4, 5, 6], [1.0, 2.0, 3.0, 4.0])
    assert interval([device], "exact_match", seed=0) == [0.75, 0.75]
    assert interval([device], "loss", seed=0) == pytest.approx([10 / 18, 10 / 18])


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    fleet = _fleet(8)
    assert interval(fleet, "loss", seed=3) == interval(fleet, "loss", seed=3)
    assert interval(fleet, "loss", seed=3) != interval(fleet, "loss", seed=4)


def test_a_sum_that_nobody_counted_is_zero() -> None:
    assert pool([{"x_sum": 1.0, "loss_sum": 2.0}]) == {"x": 0.0, "loss": 0.0}
