"""The plain reference of directions: golden values, distributions, and the algebra of the sketch."""

from __future__ import annotations

import itertools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedloom.protocols.directions import (
    NORMALS,
    OFFSETS,
    POOL,
    SIGNS,
    blocks,
    box_muller,
    check_k,
    direction,
    known_family,
    pool_keys,
    sign_vector,
    sketch_rows,
)

MAKE = Path(__file__).parent / "golden" / "make.py"
FAMILIES = ("gaussian", "rademacher")


def test_golden_values() -> None:
    made = runpy.run_path(str(MAKE))
    assert made["measure"]() == json.loads(made["GOLDEN"].read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FAMILIES)
@given(key=st.integers(0, 2**64 - 1), start=st.integers(0, 2**50), cuts=st.lists(st.integers(0, 700), max_size=3))
def test_an_element_does_not_depend_on_the_split(family: str, key: int, start: int, cuts: list[int]) -> None:
    whole = direction(family, key, "w", start, start + 700)
    edges = [0, *sorted(cuts), 700]
    parts = [direction(family, key, "w", start + a, start + b) for a, b in itertools.pairwise(edges)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_moments_and_shape_of_normals() -> None:
    n = 400_000
    z = direction("gaussian", 3, "w", 0, n).astype(np.float64)
    assert abs(z.mean()) < 4 / np.sqrt(n)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * np.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96 / n)
    assert stats.kstest(z, "norm").pvalue > 0.01
    assert np.abs(z).max() < 5.8
    quadruples = z.reshape(-1, 4)  # made from one block: two pairs
    correlation = np.corrcoef(quadruples.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(n / 4)


def test_box_muller_equals_the_formula_in_float64() -> None:
    words = blocks(11, NORMALS, "w", 0, 50_000).reshape(-1, 2)
    corners = np.array([0, 255, 256, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 1], np.uint32)
    radius = np.concatenate([words[:, 0], np.repeat(corners, len(corners))])
    angle = np.concatenate([words[:, 1], np.tile(corners, len(corners))])
    z = box_muller(radius, angle)
    r = np.sqrt(-2 * np.log(((radius >> 8) + 1) / 2.0**24))
    x = np.pi / 2 * (((angle >> 6) & 0xFFFFFF) / 2.0**24 - 0.5 + (angle >> 30))
    exact = np.stack([r * np.cos(x), r * np.sin(x)], axis=-1)
    assert z.dtype == np.float32
    assert np.abs(z - exact).max() < 1e-6


def test_signs_are_balanced_and_uncorrelated() -> None:
    n = 2**20
    z = direction("rademacher", 5, "w", 0, n).astype(np.float64)
    assert set(z) == {-1.0, 1.0}
    assert abs(z.mean()) < 4 / np.sqrt(n)
    for lag in (1, 16, 32, 128, 2048):
        assert abs((z[lag:] * z[:-lag]).mean()) < 4 / np.sqrt(n - lag)


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_of_keys_and_names_are_nearly_orthogonal(family: str) -> None:
    n = 100_000
    keys = [0, 1, 2**32, *(int(key) for key in pool_keys(1, np.arange(3)))]
    rows = np.stack([direction(family, key, name, 0, n) for key in keys for name in ("a", "b")]).astype(np.float64)
    gram = rows @ rows.T / n
    assert np.abs(gram - np.eye(len(rows))).max() < 5 * np.sqrt(2 / n)


def test_streams_are_distinct() -> None:
    made = [blocks(9, stream, "w", 0, 500) for stream in (SIGNS, NORMALS, OFFSETS, POOL)]
    assert len({block.tobytes() for stream in made for block in stream}) == 4 * 500


def test_high_blocks_do_not_repeat_low_ones() -> None:
    low, high = blocks(9, SIGNS, "w", 0, 8), blocks(9, SIGNS, "w", 2**32, 2**32 + 8)
    assert not (low == high).all(axis=1).any()


def test_keys_of_a_pool_are_distinct_and_of_their_index_alone() -> None:
    keys = pool_keys(3, np.arange(2**16))
    assert len(set(keys.tolist())) == 2**16
    assert not set(keys.tolist()) & set(pool_keys(4, np.arange(2**16)).tolist())
    assert pool_keys(3, np.array([70, 5])).tolist() == [keys[70], keys[5]]


def dense(k: int, d: int, start: int = 0) -> np.ndarray:
    """S, [d, k]."""
    buckets, signs = sketch_rows(17, "w", k, start, start + d)
    s = np.zeros((d, k))
    s[np.arange(d), buckets] = signs
    return s


@pytest.mark.parametrize(("k", "d", "start"), [(1, 10, 3), (8, 1000, 0), (64, 1024, 64), (64, 1000, 37), (256, 900, 5)])
def test_columns_of_the_sketch_are_orthogonal(k: int, d: int, start: int) -> None:
    s = dense(k, d, start)
    buckets, _ = sketch_rows(17, "w", k, start, start + d)
    counts = np.bincount(buckets, minlength=k)
    np.testing.assert_array_equal(s.T @ s, np.diag(counts))
    whole = -(-start // k) * k, (start + d) // k * k  # each whole run of k has one element for every bucket
    runs = max(0, whole[1] - whole[0]) // k
    assert runs <= counts.min() <= counts.max() <= runs + 2


def test_runs_of_the_sketch_begin_anywhere() -> None:
    buckets, _ = sketch_rows(17, "w", 16, 0, 16 * 4096)
    offsets = buckets[::16]
    assert stats.chisquare(np.bincount(offsets, minlength=16)).pvalue > 0.01


def test_a_sign_vector_is_of_its_step() -> None:
    vectors = np.stack([sign_vector(7, step, 512) for step in range(64)]).astype(np.float64)
    assert set(vectors.reshape(-1)) == {-1.0, 1.0}
    assert np.abs(vectors @ vectors.T / 512 - np.eye(64)).max() < 5 / np.sqrt(512)


def test_unknown_families_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one of gaussian, rademacher, sketch, got 'cauchy'"):
        known_family("cauchy")
    with pytest.raises(ValueError, match="must be gaussian or rademacher, got sketch"):
        direction("sketch", 0, "w", 0, 1)
    with pytest.raises(ValueError, match=r"must have 1\.\.1048576 directions, got 0"):
        check_k(0, "gaussian")
    with pytest.raises(ValueError, match="must have a power of two of buckets, got 12"):
        check_k(12, "sketch")
    check_k(12, "gaussian")


def test_numba_is_imported_only_by_the_loops() -> None:
    modules = "directions, messages, codec, kernels"
    code = f"import sys; from fedloom.protocols import {modules}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
