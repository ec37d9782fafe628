import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_fleet import PLAIN, SPEC, close, dense_of, merge, noise_payload

from fedloom.protocols.messages import LowRank, MatrixSpec, Payload, unscaled
from fedloom.strategies.lowrank import (
    Accumulator,
    Delta,
    add,
    bounded,
    break_even,
    inner,
    payload_norm,
    plus,
    product_norm,
    recompress,
    stack,
    truncate,
)
from fedloom.strategies.spectrum import leading

sizes = st.integers(1, 30)


def term(rng, d_out, d_in, rank, alpha=3.0, rslora=False, dtype=np.float64):
    b = rng.standard_normal((d_out, rank)).astype(dtype)
    return LowRank(b=b, a=rng.standard_normal((rank, d_in)).astype(dtype), alpha=alpha, rslora=rslora)


def best(m, r):
    u, s, v = np.linalg.svd(m, full_matrices=False)
    return (u[:, :r] * s[:r]) @ v[:r]


def relative(x, y):
    return np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.integers(1, 12), st.floats(0.1, 64), st.booleans(), st.integers(0, 2**32))
def test_norm_by_gram_is_dense_norm_and_invariant(d_out, d_in, rank, alpha, rslora, seed):
    rng = np.random.default_rng(seed)
    x = term(rng, d_out, d_in, rank, alpha, rslora)
    norm = product_norm(x)
    assert norm == pytest.approx(np.linalg.norm(x.dense()), rel=1e-9)
    mix = rng.standard_normal((rank, rank)) + 3 * np.eye(rank) * rank
    same = LowRank(b=x.b @ mix, a=np.linalg.solve(mix, x.a), alpha=alpha, rslora=rslora)
    assert product_norm(same) == pytest.approx(norm, rel=1e-8)
    y = term(rng, d_out, d_in, 2)
    assert inner(x, y) == pytest.approx(float(np.vdot(x.dense(), y.dense())), rel=1e-8, abs=1e-8 * norm)


def test_payload_norm_counts_factors_dense_parts_of_the_same_module_and_heads():
    rng = np.random.default_rng(0)
    payload = noise_payload(rng, SPEC, 3, 5.0)
    payload = Payload(factors=payload.factors, dense={**payload.dense, "q": rng.standard_normal((24, 40))})
    dense = dense_of(payload)
    assert payload_norm(payload) == pytest.approx(np.sqrt(sum(np.sum(x**2) for x in dense.values())))


def whole(rng, form, d_out, d_in, rank, dtype=np.float64):
    factors = term(rng, d_out, d_in, rank, dtype=dtype) if form != "dense" else None
    dense = rng.standard_normal((d_out, d_in)).astype(dtype) if form != "factors" else None
    return Delta(factors=factors, dense=dense)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["factors", "dense", "both"]),
    sizes,
    sizes,
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_truncation_is_the_best_rank_r_approximation(form, d_out, d_in, rank, cap, seed):
    delta = whole(np.random.default_rng(seed), form, d_out, d_in, rank)
    m = delta.to_dense()
    kept, residual = truncate(delta, cap)
    assert kept is not None
    assert kept.scale == 1.0
    assert kept.rank == min(cap, d_out, d_in, rank if form == "factors" else 30)
    assert relative(kept.dense(), best(m, cap)) < 1e-6
    np.testing.assert_allclose(kept.a @ kept.a.T, np.eye(kept.rank), atol=1e-10)
    s = np.linalg.norm(kept.b, axis=0)
    np.testing.assert_allclose(s, np.linalg.svd(m, compute_uv=False)[: kept.rank], rtol=1e-8)
    gram = kept.b.T @ kept.b
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-8 * s[0] ** 2)
    rows = np.arange(kept.rank)
    assert (kept.a[rows, np.argmax(np.abs(kept.a), axis=1)] > 0).all()
    left = residual.to_dense() if residual else np.zeros_like(m)
    np.testing.assert_allclose(kept.dense() + left, m, atol=1e-9 * s[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["factors", "dense", "both"])
def test_truncation_keeps_the_dtype(form, dtype):
    kept, residual = truncate(whole(np.random.default_rng(0), form, 30, 20, 8, dtype), 4)
    assert kept is not None
    parts = [kept.a, kept.b] + ([] if residual.dense is None else [residual.dense])
    parts += [] if residual.factors is None else [residual.factors.a, residual.factors.b]
    assert {x.dtype for x in parts} == {np.dtype(dtype)}


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_the_energy_share_cuts_at_the_first_rank_that_has_it(energy):
    delta = whole(np.random.default_rng(1), "factors", 30, 26, 20)
    s2 = np.linalg.svd(delta.to_dense(), compute_uv=False) ** 2
    wanted = int(np.searchsorted(np.cumsum(s2) / s2.sum(), energy)) + 1
    kept, residual = truncate(delta, 26, energy)
    assert kept is not None
    assert kept.rank == wanted
    assert residual
    capped, _ = truncate(delta, 3, energy)
    assert capped is not None
    assert capped.rank == min(3, wanted)


def test_nothing_is_left_of_a_truncation_that_cuts_only_rounding():
    kept, residual = truncate(whole(np.random.default_rng(1), "factors", 30, 26, 5), 9)
    assert kept is not None
    assert kept.rank == 5
    assert not residual
    zero = unscaled(np.zeros((4, 2)), np.ones((2, 3)))
    assert truncate(Delta(factors=zero), 2) == (None, Delta())
    assert truncate(Delta(), 2) == (None, Delta())


@pytest.mark.parametrize(("cap", "energy"), [(0, 1.0), (2, 0.0), (2, 1.5)])
def test_a_truncation_without_sense_is_refused(cap, energy):
    with pytest.raises(ValueError, match="cap >= 1"):
        truncate(Delta(dense=np.eye(3)), cap, energy)


SPECTRA = {
    "gaussian": lambda r: np.ones(r),
    "power": lambda r: np.arange(1, r + 1) ** -1.0,
    "steep": lambda r: np.arange(1, r + 1) ** -3.0,
    "low rank": lambda r: (np.arange(r) < 6) * 1.0,
    "cliff": lambda r: np.where(np.arange(r) < 6, 1.0, 1e-5),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("form", ["stack", "dense"])
def test_large_matrices_take_the_krylov_route_to_the_same_answer(form, name, dtype):
    rng = np.random.default_rng(3)
    d_out, d_in, rank, cap = 520, 460, 400, 10
    factors = unscaled(
        (rng.standard_normal((d_out, rank)) * SPECTRA[name](rank)).astype(dtype),
        rng.standard_normal((rank, d_in)).astype(dtype),
    )
    delta = Delta(factors=factors) if form == "stack" else Delta(dense=factors.dense())
    m = delta.to_dense().astype(np.float64)
    kept, residual = truncate(delta, cap)
    assert kept is not None
    s = np.linalg.svd(m, compute_uv=False)
    tol = 1e-6 if dtype == np.float32 else 1e-9
    np.testing.assert_allclose(np.linalg.norm(kept.b, axis=0), s[: kept.rank], atol=tol * s[0])
    optimum = np.sqrt(np.sum(s[cap:] ** 2))
    error = np.linalg.norm(m - kept.b.astype(np.float64) @ kept.a.astype(np.float64))
    assert error <= optimum * (1 + 1e-6) + (1e-6 if dtype == np.float32 else 1e-12) * s[0]
    if residual:
        assert relative(kept.dense() + residual.to_dense(), m) < 2 * tol


def test_a_flat_spectrum_still_ends():
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((450, 450)))
    s, v = leading(None, q.astype(np.float32), 9)
    np.testing.assert_allclose(s, 1.0, atol=1e-5)
    np.testing.assert_allclose(v @ v.T, np.eye(9), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_recompression_finds_the_numerical_rank(dtype):
    rng = np.random.default_rng(0)
    x = term(rng, 60, 50, 6, dtype=dtype)
    twice = stack([x, LowRank(b=-0.5 * x.b, a=x.a, alpha=x.alpha), LowRank(b=x.b, a=2 * x.a, alpha=x.alpha)])
    small = recompress(Delta(factors=twice))
    assert small.factors is not None
    assert small.factors.rank == 6
    assert relative(small.to_dense(), 2.5 * x.dense()) < (1e-5 if dtype == np.float32 else 1e-12)


def test_bounded_keeps_the_sum_and_the_smaller_form():
    rng = np.random.default_rng(0)
    limit = break_even(24, 40)
    assert limit == 15.0
    short, full = term(rng, 24, 40, 14), term(rng, 24, 40, 16)
    assert bounded(Delta(factors=short)).factors is short
    assert bounded(Delta(factors=full)).factors is None
    again = stack([term(rng, 24, 40, 4)] * 5)
    small = bounded(Delta(factors=again))
    assert small.factors is not None
    assert small.factors.rank == 4
    for delta in (Delta(factors=full), Delta(factors=again), Delta(factors=full, dense=np.ones((24, 40)))):
        assert relative(bounded(delta).to_dense(), delta.to_dense()) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 50), st.floats(0.5, 64), st.booleans()), min_size=1, max_size=9
    )
)
def test_the_accumulator_is_the_weighted_sum(parts):
    rng = np.random.default_rng(0)
    total, reference = Accumulator(MatrixSpec(d_out=24, d_in=40)), np.zeros((24, 40))
    weight = sum(n for _, n, _, _ in parts)
    for rank, n, alpha, rslora in parts:
        x = term(rng, 24, 40, rank, alpha, rslora)
        total.add(x, n)
        reference += n / weight * x.dense()
    delta = total.finish(weight)
    assert (delta.dense is None) == (sum(rank for rank, *_ in parts) < 15)
    assert relative(delta.to_dense(), reference) < 1e-12


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=8))
def test_patches_add_and_keep_the_newest_factors_in_front(ranks):
    rng = np.random.default_rng(0)
    held, reference = Payload(), dense_of(Payload())
    for rank in ranks:
        newest = noise_payload(rng, SPEC, rank, 7.0)
        held, reference = add(newest, held, SPEC), merge(reference, newest)
        for name, matrix in SPEC.matrices.items():
            limit = break_even(matrix.d_out, matrix.d_in)
            x = held.factors.get(name)
            if rank < limit:
                assert x is not None
                assert x.scale == 1.0
                assert x.rank < limit
                np.testing.assert_array_equal(x.a[:rank], newest.factors[name].a)
            else:
                assert x is None
    close(dense_of(held), reference, 1e-12)


def test_a_patch_with_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"must name what the model has, got \['head.weight'\]"):
        add(noise_payload(np.random.default_rng(0), SPEC, 1, 1.0), Payload(), PLAIN)


def test_plus_and_times():
    rng = np.random.default_rng(0)
    x, y = whole(rng, "factors", 9, 7, 2), whole(rng, "both", 9, 7, 3)
    np.testing.assert_allclose(plus(x, y.times(-2.0)).to_dense(), x.to_dense() - 2 * y.to_dense())
    assert not plus(Delta(), Delta())
    with pytest.raises(ValueError, match="at least one term"):
        stack([])
    with pytest.raises(ValueError, match="must have a term"):
        Delta().to_dense()
