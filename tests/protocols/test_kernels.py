"""Compiled kernels against directions.py and NumPy's arithmetic, bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.protocols import kernels, kernels_llvm, kernels_numba
from fedloom.protocols.directions import direction, pool_keys, sketch_rows

Array = np.ndarray[Any, Any]
DTYPES = (np.float32, np.float16, np.uint16)  # uint16: the bits of bfloat16
FAMILIES = ("gaussian", "rademacher", "sketch")
NAME, SEED = "model.layers.0.weight", 2**63 + 12345

dtypes = st.sampled_from(DTYPES)
starts = st.one_of(
    st.integers(0, 5000), st.integers(0, 9).map(lambda b: 128 * b), st.integers(2**39 - 5000, 2**39 + 5000)
)  # past the 2^32nd block of signs
lengths = st.one_of(st.integers(0, 300), st.integers(1900, 4500), st.integers(9000, 10000))


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """So that short arrays are split among threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_PIECE", 2048)
        patch.setattr(kernels, "_FOLDED", 4096)
        yield


def widened(array: Array) -> Array:
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array.astype(np.float32)


def rounded(values: Array, dtype: Any) -> Array:
    """float32 to the nearest, ties to even; bfloat16 by integers."""
    if dtype != np.uint16:
        with np.errstate(all="ignore"):
            return values.astype(dtype)
    bits = values.view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def weights(n: int, dtype: Any, seed: int = 0) -> Array:
    return rounded(np.random.default_rng(seed).standard_normal(n).astype(np.float32), dtype)


def numbers(n: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def expected(family: str, base: Array, dtype: Any, start: int, c: Array, name: str = NAME) -> Array:
    """What the kernels have to make, from the reference."""
    stop = start + base.size
    if family == "sketch":
        buckets, signs = sketch_rows(SEED, name, c.size, start, stop)
        return rounded(widened(base) + signs * c[buckets], dtype)
    total = np.zeros(base.size, np.float32)
    for key, scale in zip(pool_keys(SEED, np.arange(c.size)), c, strict=True):
        total += scale * direction(family, int(key), name, start, stop)
    return rounded(widened(base) + total, dtype)


def add(
    family: str, out: Array, base: Array, start: int, c: Array, threads: int = 1, rows: Array | None = None
) -> None:
    """The kernel of a family; coefficients c are those of a sketch, or the scales of a pool."""
    where: dict[str, Any] = {"name": NAME, "threads": threads} | ({"start": start} if rows is None else {})
    arrays = (out, base) if rows is None else (out, base, rows)
    if family == "sketch":
        kernel: Callable[..., None] = kernels.add_sketch if rows is None else kernels.add_sketch_rows
        kernel(*arrays, seed=SEED, c=c, **where)
        return
    kernel = kernels.add_directions if rows is None else kernels.add_directions_rows
    kernel(*arrays, family=family, keys=pool_keys(SEED, np.arange(c.size)), scales=c, **where)


def same(got: Array, wanted: Array) -> None:
    assert got.dtype == wanted.dtype
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("family", FAMILIES)
@given(dtype=dtypes, start=starts, n=lengths, power=st.integers(0, 13), threads=st.integers(1, 4))
def test_equal_the_reference(family: str, dtype: Any, start: int, n: int, power: int, threads: int) -> None:
    base, c = weights(n, dtype), numbers(2**power if family == "sketch" else power)
    wanted = expected(family, base, dtype, start, c)
    out = np.empty_like(base)
    add(family, out, base, start, c, threads)
    same(out, wanted)
    add(family, base, base, start, c, threads)
    same(base, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@given(into=dtypes, dtype=dtypes, n=lengths, start=starts, one=st.booleans())
def test_out_may_be_of_another_dtype(family: str, into: Any, dtype: Any, n: int, start: int, one: bool) -> None:
    base, c = weights(n, dtype), numbers(256 if family == "sketch" else 1 if one else 6)
    out = np.empty(n, into)
    add(family, out, base, start, c)
    same(out, expected(family, base, into, start, c))


@pytest.mark.parametrize("family", FAMILIES)
@given(cuts=st.lists(st.integers(0, 6000), max_size=4), start=starts, backwards=st.booleans())
def test_pieces_make_the_whole(family: str, cuts: list[int], start: int, backwards: bool) -> None:
    base, c = weights(6000, np.float32), numbers(1024 if family == "sketch" else 5)
    out = np.empty_like(base)
    edges = [0, *sorted(cuts), 6000]
    for low, high in list(itertools.pairwise(edges))[:: -1 if backwards else 1]:
        add(family, out[low:high], base[low:high], start + low, c)
    same(out, expected(family, base, np.float32, start, c))


@pytest.mark.parametrize("family", FAMILIES)
@given(
    dtype=dtypes,
    d=st.sampled_from([1, 3, 64, 100, 128, 384, 2500]),
    rows=st.lists(st.integers(0, 19), max_size=30),
    threads=st.integers(1, 4),
    power=st.integers(0, 12),
)
def test_rows_are_rows_of_the_whole(family: str, dtype: Any, d: int, rows: list[int], threads: int, power: int) -> None:
    table, c = weights(20 * d, dtype), numbers(2**power if family == "sketch" else power % 6)
    out = np.empty((len(rows), d), dtype)
    add(family, out, table.reshape(20, d), 0, c, threads, np.array(rows, np.int64))
    same(out, expected(family, table, dtype, 0, c).reshape(20, d)[rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_full_size(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PIECE", 1 << 19)
    base, c = weights(2_300_001, np.float32), numbers(65536 if family == "sketch" else 2)
    out = np.empty_like(base)
    add(family, out, base, 5, c, threads=2)
    same(out, expected(family, base, np.float32, 5, c))


def test_memory_may_begin_at_any_byte() -> None:
    memory = np.zeros(4001, np.uint8)
    out, base = memory[1:].view(np.float32), weights(1000, np.float32)
    c = numbers(5)
    add("gaussian", out, base, 0, c)
    same(out, expected("gaussian", base, np.float32, 0, c))


SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 65536, 3.4e38, -3.4e38], np.float32)


def edges() -> Array:
    """float32 around every float16 and bfloat16, the ties between them and their neighbours, and subnormals."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    brains = widened(np.arange(2**16, dtype=np.uint16))
    steps = np.arange(2**16, dtype=np.uint32)[:, None] << np.uint32(16)
    ties = (steps | np.array([0x7FFF, 0x8000, 0x8001], np.uint32)).view(np.float32).reshape(-1)
    between = ((halves.astype(np.float64)[1:] + halves[:-1]) / 2).astype(np.float32)
    near = np.concatenate([np.nextafter(between, np.float32(s)) for s in (-np.inf, np.inf)])
    return np.concatenate([SPECIAL, halves, brains, ties, between, near])


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
@pytest.mark.parametrize("fused", [False, True])
def test_roundings_to_16_bits(dtype: Any, fused: bool) -> None:
    values = edges()
    values = values[: values.size // 2048 * 2048]
    torch_dtype = torch.float16 if dtype == np.float16 else torch.bfloat16
    if fused:  # the way of one direction, whose base has the dtype of out: 0 + values
        base, c = np.zeros(values.size, dtype), np.ascontiguousarray(values[np.isfinite(values)][: 2**17])
        buckets, signs = sketch_rows(SEED, NAME, c.size, 0, base.size)
        values, out = signs * c[buckets], np.empty(base.size, dtype)
        add("sketch", out, base, 0, c)
    else:
        base, out = values, np.empty(values.size, dtype)
        add("rademacher", out, base, 0, numbers(0))
    values[values == 0] = 0  # -0 + 0 is 0
    wanted, nan = rounded(values, dtype), np.isnan(values)
    same(out[~nan], wanted[~nan])
    assert np.isnan(widened(out[nan]) if dtype == np.uint16 else out[nan]).all()
    by_torch = torch.from_numpy(values[~nan]).to(torch_dtype).view(torch.uint16).numpy()
    same(out[~nan].view(np.uint16), by_torch)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_every_16_bit_number_is_read_exactly(dtype: Any) -> None:
    base = np.arange(2**16, dtype=np.uint16).view(dtype)
    out = np.empty(base.size, np.float32)
    add("rademacher", out, base, 0, numbers(0))
    wanted, nan = widened(base), np.isnan(widened(base))
    wanted[wanted == 0] = 0  # -0 + 0 is 0
    same(out[~nan], wanted[~nan])
    assert np.isnan(out[nan]).all()


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_sums_are_taken_in_the_order_of_keys(family: str) -> None:
    base = np.zeros(3000, np.float32)
    c = np.array([1e8, 1.0, -1e8, 3e-8, 7.0, -1e8, 1e8, 0.0, -0.0], np.float32)
    out = np.empty_like(base)
    add(family, out, base, 0, c)
    same(out, expected(family, base, np.float32, 0, c))
    with np.errstate(all="ignore"):
        assert (out != (c[0] + c[2] + c[1])).any()


def fold(k: int, gradient: Array, start: int = 0, threads: int = 1, into: Any = np.float64) -> Array:
    made = np.zeros(k, into)
    kernels.fold_sketch(made, gradient, name=NAME, start=start, seed=SEED, threads=threads)
    return made


@given(dtype=dtypes, start=starts, n=lengths, power=st.integers(0, 13), threads=st.integers(1, 4))
def test_fold_equals_the_reference_whatever_the_threads(
    dtype: Any, start: int, n: int, power: int, threads: int
) -> None:
    gradient, k = weights(n, dtype), 2**power
    buckets, signs = sketch_rows(SEED, NAME, k, start, start + n)
    wanted = np.bincount(buckets, weights=signs.astype(np.float64) * widened(gradient), minlength=k)
    got = fold(k, gradient, start, threads)
    np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-12)
    same(got, fold(k, gradient, start, 1))
    same(fold(k, gradient, start, threads, np.float32), got.astype(np.float32))


def test_fold_adds_to_what_is_there() -> None:
    gradient = weights(5000, np.float32)
    into = numbers(64)
    wanted = (into + fold(64, gradient)).astype(np.float32)
    kernels.fold_sketch(into, gradient, name=NAME, start=0, seed=SEED)
    same(into, wanted)


@pytest.mark.parametrize("k", [1, 32, 128, 4096])
def test_fold_is_the_adjoint_of_add(k: int) -> None:
    n, start = 50_001, 77
    c, gradient = numbers(k), weights(n, np.float32, seed=3)
    direction_of_c = np.empty(n, np.float32)
    add("sketch", direction_of_c, np.zeros(n, np.float32), start, c)
    through = direction_of_c.astype(np.float64) @ gradient.astype(np.float64)
    back = c.astype(np.float64) @ fold(k, gradient, start)
    assert through == pytest.approx(back, rel=1e-11)


DIGEST = """
import hashlib, numpy as np
from fedloom.protocols import kernels
base, made = np.linspace(-2, 2, 5001, dtype=np.float32), hashlib.sha256()
c = np.linspace(-1, 1, 256, dtype=np.float32)
keys = np.arange(7, dtype=np.uint64)
for dtype in (np.float32, np.float16, np.uint16):
    out = np.empty(5001, dtype)
    for family in ("gaussian", "rademacher"):
        kernels.add_directions(out, base, name="w", start=3, family=family, keys=keys, scales=c[:7])
        made.update(out.tobytes())
    kernels.add_sketch(out, base, name="w", start=3, seed=1, c=c)
    made.update(out.tobytes())
into = np.zeros(256)
kernels.fold_sketch(into, base, name="w", start=3, seed=1)
made.update(into.tobytes())
"""


def test_a_plain_processor_makes_the_same_bits(tmp_path: Path) -> None:
    here: dict[str, Any] = {}
    exec(DIGEST, here)
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    script = [sys.executable, "-c", DIGEST + "print(made.hexdigest())"]
    there = subprocess.run(script, env=os.environ | plain, check=True, capture_output=True, text=True)
    assert there.stdout.strip() == here["made"].hexdigest()


def test_the_cache_on_disk_changes_with_the_steps() -> None:
    """Where this fails, set LLVM_SOURCE to what is expected: then Numba compiles anew."""
    source = Path(kernels_llvm.__file__).read_bytes()
    assert hashlib.sha256(source).hexdigest()[:8] == kernels_numba.LLVM_SOURCE


def test_without_a_folder_to_write_in_code_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert kernels_numba._jit(lambda x: x + 1)(2) == 3


def test_a_thread_that_fails_is_heard() -> None:
    def fail(item: int) -> int:
        raise OverflowError(str(item))

    with pytest.raises(OverflowError, match=r"[0-7]"):
        kernels._run(fail, range(8), threads=2)


FLOATS, KEYS = np.zeros(6, np.float32), np.zeros(2, np.uint64)
READ_ONLY = np.broadcast_to(np.float32(0), (1,))
MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("out must be float32 or float16 or uint16, got float64", {"out": np.zeros(6)}),
    ("base must be float32 or float16 or uint16, got int32", {"base": np.zeros(6, np.int32)}),
    (r"out must have the shape of base, \(6,\), got \(5,\)", {"out": np.zeros(5, np.float32)}),
    (r"out must be contiguous with 1 axes, got \(6,\) with strides \(8,\)", {"out": np.zeros(12, np.float32)[::2]}),
    (r"base must be contiguous with 1 axes, got \(2, 3\)", {"base": FLOATS.reshape(2, 3)}),
    ("out must be writeable, got a read-only array", {"out": READ_ONLY, "base": READ_ONLY}),
    ("start must be at least 0, got -1", {"start": -1}),
    ("a family of directions must be one of .*, got 'cauchy'", {"family": "cauchy"}),
    ("a direction must be gaussian or rademacher, got sketch", {"family": "sketch"}),
    ("keys must be uint64, got int64", {"keys": np.zeros(2, np.int64)}),
    ("scales must be float32, got float64", {"scales": np.zeros(2)}),
    ("keys and scales must be equally many, got 2 and 3", {"scales": np.zeros(3, np.float32)}),
    ("threads must be at least 1, got 0", {"threads": 0}),
]


@pytest.mark.parametrize(("message", "wrong"), MISTAKES)
def test_mistakes_in_directions(message: str, wrong: dict[str, Any]) -> None:
    right = {"name": "w", "start": 0, "family": "gaussian", "keys": KEYS, "scales": np.zeros(2, np.float32)}
    given = {"out": FLOATS.copy(), "base": FLOATS} | right | wrong
    with pytest.raises(ValueError, match=message):
        kernels.add_directions(**given)


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (r"rows must be in 0\.\.1, got 0\.\.2", {"rows": np.array([0, 2, 1])}),
        (r"rows must be in 0\.\.1, got -1\.\.1", {"rows": np.array([0, -1, 1])}),
        ("rows must be int64, got int32", {"rows": np.zeros(3, np.int32)}),
        (r"out must have shape \(2, 3\), got \(3, 3\)", {"rows": np.zeros(2, np.int64)}),
        ("base must be contiguous with 2 axes", {"base": np.zeros(6, np.float32)}),
        ("a sketch must have a power of two of buckets, got 12", {"c": np.zeros(12, np.float32)}),
        ("a subspace must have .* directions, got 0", {"c": np.zeros(0, np.float32)}),
        ("c must be float32, got float64", {"c": np.zeros(4)}),
        (r"a seed must be in 0\.\.2\^64 - 1, got -1", {"seed": -1}),
    ],
)
def test_mistakes_in_rows_of_a_sketch(message: str, wrong: dict[str, Any]) -> None:
    right = {"rows": np.array([0, 1, 1]), "name": "w", "seed": 0, "c": np.zeros(4, np.float32)}
    given = {"out": np.zeros((3, 3), np.float32), "base": np.zeros((2, 3), np.float32)} | right | wrong
    with pytest.raises(ValueError, match=message):
        kernels.add_sketch_rows(**given)


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("into must be float32 or float64, got float16", {"into": np.zeros(4, np.float16)}),
        ("into must be contiguous with 1 axes", {"into": np.zeros((2, 2))}),
        ("a sketch must have a power of two of buckets, got 3", {"into": np.zeros(3)}),
        ("gradient must be float32 or float16 or uint16, got float64", {"gradient": np.zeros(4)}),
        ("start must be at least 0, got -5", {"start": -5}),
    ],
)
def test_mistakes_in_fold(message: str, wrong: dict[str, Any]) -> None:
    given = {"into": np.zeros(4), "gradient": FLOATS, "name": "w", "start": 0, "seed": 0} | wrong
    with pytest.raises(ValueError, match=message):
        kernels.fold_sketch(**given)
