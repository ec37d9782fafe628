"""Starting values of A: the same on every machine, whatever the rank."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.protocols.initial import initial_a

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    name=NAMES,
    ranks=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    d_in=st.integers(1, 40),
)
def test_the_first_rows_do_not_depend_on_the_rank(seed: int, name: str, ranks: tuple[int, int], d_in: int) -> None:
    low, high = sorted(ranks)
    np.testing.assert_array_equal(initial_a(seed, name, high, d_in)[:low], initial_a(seed, name, low, d_in))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), d_in=st.integers(1, 400))
def test_values_are_float32_within_one_over_the_root_of_d_in(seed: int, d_in: int) -> None:
    a = initial_a(seed, "q", 8, d_in)
    assert (a.dtype, a.shape) == (np.float32, (8, d_in))
    assert (abs(a) <= np.float32(d_in**-0.5)).all()


def test_values_are_uniform() -> None:
    """Mean 0 and variance 1 / (3 d_in) within 5 standard errors of 400,000 draws."""
    d_in, count = 1000, 400_000
    a = initial_a(1, "q", 400, d_in).astype(np.float64).reshape(-1) * np.sqrt(d_in)
    assert abs(a.mean()) < 5 / np.sqrt(3 * count)
    assert abs((a**2).mean() - 1 / 3) < 5 * np.sqrt((1 / 5 - 1 / 9) / count)
    counts = np.histogram(a, bins=20, range=(-1, 1))[0]
    assert ((counts - count / 20) ** 2 / (count / 20)).sum() < 19 + 5 * np.sqrt(2 * 19)


def test_seeds_and_names_are_independent() -> None:
    """Correlations between different streams have a standard error of 1 / sqrt(n)."""
    draws = [initial_a(seed, name, 20, 1000).reshape(-1) for seed in (0, 1, 2**63) for name in ("q", "k", "layers.1.q")]
    correlation = np.corrcoef(np.array(draws, np.float64)) - np.eye(len(draws))
    assert abs(correlation).max() < 5 / np.sqrt(20_000)


def test_golden_values() -> None:
    """Printed by `[x.hex() for x in initial_a(7, "layers.0.q", 2, 3).ravel().tolist()]` on x86-64 with numpy 2.4."""
    golden = [
        "0x1.6043840000000p-4",
        "0x1.0c45020000000p-1",
        "-0x1.42cb900000000p-5",
        "0x1.9d10960000000p-5",
        "0x1.485b580000000p-3",
        "0x1.b11b480000000p-2",
    ]
    assert [x.hex() for x in initial_a(7, "layers.0.q", 2, 3).ravel().tolist()] == golden
