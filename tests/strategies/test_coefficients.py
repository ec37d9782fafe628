"""Coefficients as whole numbers: exact sums, nothing lost to rounding, one way or another the same bits."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedloom.protocols.messages import Coefficients, Subspace
from fedloom.strategies.coefficients import WINDOW, first_log, minus, plus, read_log, reduced, rounded, zero

SPACE = Subspace(family="sketch", k=8, seed=5)


def coefficients(steps, exponent=0, subspace=SPACE):
    return Coefficients(subspace=subspace, exponent=exponent, steps=np.array(steps, np.int64))


numbers = st.builds(coefficients, st.lists(st.integers(-(2**20), 2**20), min_size=8, max_size=8), st.integers(-40, -20))


@given(numbers, numbers, numbers)
def test_sums_are_exact_in_any_order(x, y, z):
    one, other = reduced(plus(plus(x, y), z)), reduced(plus(x, plus(z, y)))
    np.testing.assert_array_equal(one.steps, other.steps)
    assert one.exponent == other.exponent
    exact = [a + b + c for a, b, c in zip(x.values(), y.values(), z.values(), strict=True)]
    np.testing.assert_array_equal(one.values(), exact)
    np.testing.assert_array_equal(plus(minus(x, y), y).values(), x.values())


@given(numbers)
def test_reduced_is_the_same_number_in_fewer_bits(x):
    less = reduced(x)
    np.testing.assert_array_equal(less.values(), x.values())
    assert not less.steps.any() or (less.steps & 1).any()


def test_only_coefficients_of_one_subspace_add():
    with pytest.raises(ValueError, match="must be of one subspace"):
        plus(zero(SPACE), zero(replace(SPACE, seed=6)))


def test_a_sum_past_53_bits_is_refused():
    with pytest.raises(ValueError, match="must fit 53 bits"):
        plus(coefficients([2**40] * 8, exponent=0), coefficients([1] * 8, exponent=-20))


@pytest.mark.parametrize("bits", [0, 2, 8, 30])
def test_rounding_keeps_that_many_bits_below_the_root_mean_square(bits):
    step = np.random.default_rng(0).standard_normal(8) * 3e-4
    kept, left = rounded(step, SPACE, bits, zero(SPACE))
    np.testing.assert_array_equal(kept.values() + left, step)
    grid = 2.0**kept.exponent
    rms = np.sqrt(np.mean(step**2))
    assert grid <= rms * 2.0**-bits < 2 * grid
    assert np.abs(left).max() <= grid / 2


def test_zeros_do_not_count_towards_the_root_mean_square():
    step = np.zeros(8)
    step[2] = 1.0
    kept, _ = rounded(step, SPACE, 3, zero(SPACE))
    assert (kept.exponent, kept.steps[2]) == (-3, 8)


def test_a_tiny_step_after_a_large_one_waits_in_the_residual_until_it_counts():
    """The exponent is bounded from below so that sums stay exact; what is too small for it is kept, not lost."""
    log = first_log("base", SPACE).push(np.full(8, 1.0), 40)
    tiny = np.full(8, 2.0**-60)
    log = log.push(tiny, 40)
    np.testing.assert_array_equal(log.total.values() + log.residual, np.full(8, 1.0 + 2.0**-60))
    assert np.abs(log.residual).max() == 2.0**-60


def test_a_step_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="must be finite"):
        first_log("base", SPACE).push(np.full(8, np.nan), 4)


def walk(rounds, bits=1, feedback=True, seed=0):
    rng = np.random.default_rng(seed)
    steps = [rng.standard_normal(8) * 1e-3 / (1 + t) for t in range(rounds)]
    log = first_log("base", SPACE)
    for step in steps:
        log = log.push(step, bits, error_feedback=feedback)
    return log, steps


@pytest.mark.parametrize("bits", [0, 1, 6])
def test_nothing_is_lost_for_good(bits):
    log, steps = walk(50, bits)
    np.testing.assert_allclose(log.total.values() + log.residual, np.sum(steps, axis=0), atol=1e-15)
    last = 2.0 ** log.recent[0].exponent
    assert np.abs(log.residual).max() <= last / 2
    without, _ = walk(50, 0, feedback=False)
    assert not without.residual.any()


@pytest.mark.parametrize("strides", [[1] * 12, [12], [3, 9], [5, 1, 6], [2, 2, 8]])
def test_whatever_it_missed_a_device_holds_the_same_bits(strides):
    rng = np.random.default_rng(3)
    log, held, version = first_log("base", SPACE), zero(SPACE), 0
    waits = iter(np.cumsum(strides))
    due = next(waits)
    for t in range(1, 13):
        log = log.push(rng.standard_normal(8) * 10.0 ** rng.integers(-6, 0), 2)
        if t == due:
            patch = log.since(version)
            change = patch.payload.coefficients
            held = change if patch.since == 0 else plus(change, held)
            version, due = patch.version, next(waits, None)
    assert version == 12
    np.testing.assert_array_equal(held.values(), log.total.values())


def test_who_was_away_longer_than_the_window_gets_all():
    log, _ = walk(WINDOW + 5)
    assert len(log.recent) == WINDOW
    assert log.since(5).since == 5
    assert log.since(4).since == 0
    np.testing.assert_array_equal(log.since(4).payload.coefficients.values(), log.total.values())
    ahead = log.since(log.version + 3)
    assert (ahead.since, ahead.version) == (0, log.version)


def test_up_to_date_and_before_the_first_round():
    assert first_log("base", SPACE).since(0) is None
    log, _ = walk(3)
    patch = log.since(3)
    assert (patch.since, patch.version, bool(patch.payload)) == (3, 3, False)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        log.since(-1)


def test_a_log_survives_a_checkpoint_bit_for_bit():
    log, _ = walk(9, bits=20)
    again = read_log(9, load(save(log.tensors())), json.loads(json.dumps(log.meta())))
    more = np.random.default_rng(9).standard_normal(8)
    for x, y in ((again, log), (again.push(more, 3), log.push(more, 3))):
        np.testing.assert_array_equal(x.total.values(), y.total.values())
        np.testing.assert_array_equal(x.residual, y.residual)
        assert len(x.recent) == len(y.recent)
        for a, b in zip(x.recent, y.recent, strict=True):
            np.testing.assert_array_equal(a.values(), b.values())


def test_coefficients_have_the_shape_of_their_subspace():
    with pytest.raises(ValueError, match=r"must have shape \[8\], got \[3\]"):
        coefficients([1, 2, 3])
