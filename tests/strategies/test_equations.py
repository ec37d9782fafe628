"""Each strategy against its own equation, in float64."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_fleet import PLAIN, SPEC, answers, close, dense_of, exact_mean, merge, noise_payload, reports, update_of

from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import LowRank, MatrixSpec, ModelSpec, Payload, Start
from fedloom.strategies.base import Scaling
from fedloom.strategies.fedit import FedIT
from fedloom.strategies.fedloom import Fedloom
from fedloom.strategies.ffa import FFA, drop_a, fill_a
from fedloom.strategies.flexlora import FlexLoRA
from fedloom.strategies.flora import Flora
from fedloom.strategies.hetlora import HetLoRA
from fedloom.strategies.packing import unpack
from fedloom.strategies.patchlog import read_log

clients = st.lists(
    st.tuples(st.integers(1, 8), st.integers(1, 99), st.floats(0.25, 64.0), st.booleans()), min_size=1, max_size=7
)
shapes = st.tuples(st.integers(8, 40), st.integers(8, 40), st.sampled_from(["linear", "conv1d"]))


def mixed(parts, spec, seed=0):
    rng = np.random.default_rng(seed)
    return [
        update_of(noise_payload(rng, spec, rank, alpha, rslora=rslora), f"d{i}", n)
        for i, (rank, n, alpha, rslora) in enumerate(parts)
    ]


def spec_with(shape):
    return ModelSpec(
        base_hash="h", matrices={"w": MatrixSpec(d_out=shape[0], d_in=shape[1], kind=shape[2])}, dense={"head": (4,)}
    )


@settings(max_examples=40, deadline=None)
@given(clients, shapes, st.integers(0, 99))
def test_flora_and_fedloom_at_full_rank_are_the_exact_mean(parts, shape, seed):
    spec = spec_with(shape)
    updates = mixed(parts, spec, seed)
    for strategy in (Flora(), Fedloom(rank_cap=40), Fedloom(rank_cap=40, error_feedback=False, start="fresh")):
        state = strategy.aggregate(strategy.init(spec, 0), iter(updates))
        close(dense_of(strategy.adapter(state), spec), exact_mean(updates, spec))
        patch = strategy.catch_up(state, 0)
        assert patch is not None
        close(dense_of(patch.payload, spec), exact_mean(updates, spec))


def test_flora_publishes_the_stack_itself():
    updates = mixed([(2, 1, 4.0, False), (3, 3, 3.0, True)], PLAIN)
    strategy = Flora()
    patch = strategy.catch_up(strategy.aggregate(strategy.init(PLAIN, 0), updates), 0)
    assert patch is not None
    stack, (x, y) = patch.payload.factors["q"], [u.payload.factors["q"] for u in updates]
    np.testing.assert_array_equal(stack.b, np.concatenate([x.b, y.b], axis=1))
    np.testing.assert_allclose(stack.a, np.concatenate([0.25 * 2.0 * x.a, 0.75 * 3**0.5 * y.a]), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(clients, shapes, st.integers(1, 6), st.sampled_from([1.0, 0.8]))
def test_fedloom_sends_the_best_rank_r_part(parts, shape, cap, energy):
    spec = spec_with(shape)
    updates = mixed(parts, spec)
    strategy = Fedloom(rank_cap=cap, energy=energy)
    sent = read_log(strategy.aggregate(strategy.init(spec, 0), updates)).recent[0].factors["w"]
    m = exact_mean(updates, spec)["w"]
    u, s, v = np.linalg.svd(m)
    r = sent.rank
    enough = int(np.searchsorted(np.cumsum(s**2) / np.sum(s**2), energy - 1e-12)) + 1
    assert r == min(cap, enough, int(np.sum(s > 1e-12 * s[0])))
    close({"w": sent.dense()}, {"w": (u[:, :r] * s[:r]) @ v[:r]})


@pytest.mark.parametrize("options", [{}, {"energy": 0.7}, {"rank_cap": 1}, {"server_lr": 0.5}])
def test_error_feedback_conserves_the_sum(options):
    strategy = Fedloom(**{"rank_cap": 3, **options})
    rng = np.random.default_rng(0)
    state, total = strategy.init(SPEC, 0), dense_of(Payload())
    for round in range(7):
        updates = answers(strategy, state, reports([8, 4, 2, 1][: 1 + round % 4]), SPEC, rng, round)
        mean = exact_mean(updates)
        total = {name: total[name] + mean[name] for name in total}
        state = strategy.aggregate(state, updates)
        kept_and_residual = merge(dense_of(strategy.adapter(state)), unpack("residual", state.tensors))
        close(kept_and_residual, total, 1e-9)
    assert any(name.startswith("residual/") for name in state.tensors)


def test_without_error_feedback_or_with_a_residual_rank_less_is_kept():
    rng = np.random.default_rng(0)
    spec = replace(PLAIN, matrices={"w": MatrixSpec(d_out=24, d_in=40)})
    updates = [update_of(noise_payload(rng, spec, 12, 12.0))]
    s = np.linalg.svd(exact_mean(updates, spec)["w"], compute_uv=False)
    for options, wanted in (
        ({"error_feedback": False}, 0.0),
        ({"residual_rank": 4}, np.sum(s[3:7] ** 2)),
        ({}, np.sum(s[3:12] ** 2)),
    ):
        strategy = Fedloom(rank_cap=3, **options)
        state = strategy.aggregate(strategy.init(spec, 0), updates)
        residual = dense_of(unpack("residual", state.tensors), spec)["w"]
        assert np.sum(residual**2) == pytest.approx(wanted, rel=1e-9)


def test_fedloom_plans_from_the_newest_singular_vectors():
    strategy, rng = Fedloom(rank_cap=2), np.random.default_rng(0)
    state = strategy.init(PLAIN, 0)
    for round in range(3):
        state = strategy.aggregate(state, answers(strategy, state, reports([4, 4]), PLAIN, rng, round))
    early, late = strategy.plan(state, reports([4, 8], version=0), 3), strategy.plan(state, reports([4], version=2), 3)
    assert all(task.start_from is Start.PATCH for task in early)
    assert early[0].patch is early[1].patch
    assert [task.rank for task in early] == [4, 8]
    a, b = early[0].patch.payload.factors["q"].a, late[0].patch.payload.factors["q"].a
    np.testing.assert_array_equal(a[:2], b[:2])
    assert not strategy.plan(state, reports([4], version=3), 3)[0].patch.payload


@settings(max_examples=25, deadline=None)
@given(clients, shapes)
def test_flexlora_is_the_svd_of_the_dense_mean(parts, shape):
    spec = spec_with(shape)
    updates = mixed(parts, spec)
    strategy = FlexLoRA(rank=6)
    state = strategy.aggregate(strategy.init(spec, 0), updates)
    u, s, v = np.linalg.svd(exact_mean(updates, spec)["w"], full_matrices=False)
    for task in strategy.plan(state, reports([1, 3, 6, 8]), 1):
        r = min(task.rank, 6)
        given = task.start.factors["w"]
        assert given.rank == task.rank == r
        assert (given.alpha, given.scale) == (2.0 * r, 2.0)
        close({"w": given.dense()}, {"w": (u[:, :r] * s[:r]) @ v[:r]})
        full = min(r, int(np.sum(s > 1e-10 * s[0])))
        np.testing.assert_allclose(
            np.linalg.norm(given.a[:full], axis=1), 2 * np.linalg.norm(given.b[:, :full], axis=0), rtol=1e-8
        )
        np.testing.assert_array_equal(given.a[full:], initial_a(0, "w", r, shape[1])[full:])


def test_fedit_means_factors_and_so_has_cross_terms():
    strategy = FedIT(rank=3)
    updates = mixed([(3, 1, 6.0, False), (3, 2, 6.0, False), (3, 5, 6.0, False)], PLAIN)
    state = strategy.aggregate(strategy.init(PLAIN, 0), updates)
    p, got = np.array([1, 2, 5]) / 8, strategy.adapter(state).factors["q"]
    terms = [u.payload.factors["q"] for u in updates]
    np.testing.assert_allclose(got.a, sum(pk * x.a for pk, x in zip(p, terms, strict=True)), rtol=1e-12)
    np.testing.assert_allclose(got.b, sum(pk * x.b for pk, x in zip(p, terms, strict=True)), rtol=1e-12)
    cross = sum(
        pj * pk * 2.0 * x.b @ y.a for pj, x in zip(p, terms, strict=True) for pk, y in zip(p, terms, strict=True)
    )
    close({"q": got.dense()}, {"q": cross})
    exact = exact_mean(updates, PLAIN)["q"]
    assert np.linalg.norm(got.dense() - exact) > 0.3 * np.linalg.norm(exact)


@pytest.mark.parametrize("second", [(2, 1, 6.0, False), (3, 1, 3.0, False), (3, 1, 6.0, True)])
@pytest.mark.parametrize("strategy", [FedIT(rank=3), FFA(rank=3)])
def test_one_rank_and_one_alpha_are_asked_for(strategy, second):
    updates = mixed([(3, 1, 6.0, False), second], PLAIN)
    if isinstance(strategy, FFA):
        updates = [replace(u, payload=drop_a(u.payload)) for u in updates]
    with pytest.raises(ValueError, match="update of d1 must have rank 3 and alpha 6 for"):
        strategy.aggregate(strategy.init(PLAIN, 0), updates)


@pytest.mark.parametrize("strategy", [FedIT(), FFA()])
def test_the_shared_rank_is_the_smallest_of_the_fleet(strategy):
    fleet = reports([8, 4, 6])
    state = strategy.init(PLAIN, 0, fleet)
    assert {task.rank for task in strategy.plan(state, fleet[:1], 0)} == {4}
    with pytest.raises(ValueError, match="d0 must train the shared rank 4, got a largest rank of 2"):
        strategy.plan(state, reports([2]), 0)
    with pytest.raises(ValueError, match="rank >= 1 or the fleet's devices, got neither"):
        strategy.init(PLAIN, 0)


def test_fedit_starts_from_the_seeded_a_and_zero():
    state = FedIT(rank=4).init(PLAIN, 7)
    start = FedIT(rank=4).plan(state, reports([4]), 0)[0].start.factors["q"]
    np.testing.assert_array_equal(start.a, initial_a(7, "q", 4, 40))
    assert not start.b.any()


def test_ffa_is_exact_with_half_the_bytes():
    strategy = FFA(rank=4)
    state = strategy.init(SPEC, 11)
    rng = np.random.default_rng(0)
    for round in range(2):
        updates = answers(strategy, state, reports([4, 5, 6]), SPEC, rng, round)
        full = [replace(u, payload=fill_a(u.payload, 11, SPEC)) for u in updates]
        before = dense_of(strategy.adapter(state))["head.weight"]
        state = strategy.aggregate(state, updates)
        mean = exact_mean(full)
        mean["head.weight"] = mean["head.weight"] + before
        close(dense_of(strategy.adapter(state)), mean, 1e-12)
    for task in (strategy.plan(state, reports([4]), 2)[0], strategy.plan_evaluation(state, reports([4]), 2)[0]):
        assert (task.shared_a_seed, task.train_a) == (11, False)
        assert {x.a.size for x in [*task.start.factors.values(), *updates[0].payload.factors.values()]} == {0}
        whole = Payload(factors=strategy.adapter(state).factors)
        close(dense_of(fill_a(task.start, 11, SPEC), PLAIN), dense_of(whole, PLAIN), 1e-12)


def test_ffa_refuses_an_a():
    strategy = FFA(rank=3)
    with pytest.raises(ValueError, match="a \\[r, 0\\] for q"):
        strategy.aggregate(strategy.init(PLAIN, 0), mixed([(3, 1, 6.0, False)], PLAIN))


@pytest.mark.parametrize("weights", ["norm", "examples"])
def test_hetlora_pads_with_zeros_and_cuts_to_rank(weights):
    parts = [(2, 3, 4.0, False), (4, 1, 4.0, False), (3, 6, 2.0, True)]
    updates = mixed(parts, PLAIN)
    strategy = HetLoRA(rank=4, weights=weights)
    state = strategy.aggregate(strategy.init(PLAIN, 0), updates)
    norms = [np.sqrt(sum(np.sum(x**2) for x in dense_of(u.payload, PLAIN).values())) for u in updates]
    w = np.array(norms if weights == "norm" else [3, 1, 6])
    w = w / w.sum()
    a, b = np.zeros((4, 40)), np.zeros((24, 4))
    for wk, update in zip(w, updates, strict=True):
        x = update.payload.factors["q"]
        a[: x.rank] += wk * x.a
        b[:, : x.rank] += wk * x.scale * x.b
    close({"q": strategy.adapter(state).factors["q"].dense()}, {"q": b @ a}, 1e-12)
    for task, r in zip(strategy.plan(state, reports([1, 2, 9]), 1), (1, 2, 4), strict=True):
        given = task.start.factors["q"]
        assert given.rank == task.rank == r
        close({"q": given.dense()}, {"q": b[:, :r] @ a[:r]}, 1e-12)


def test_hetlora_with_products_of_no_norm_stays_where_it_is():
    strategy = HetLoRA(rank=3)
    state = strategy.init(PLAIN, 0)
    payload = noise_payload(np.random.default_rng(0), PLAIN, 3, 6.0)
    zero = {name: replace(x, b=np.zeros_like(x.b)) for name, x in payload.factors.items()}
    after = strategy.aggregate(state, [update_of(Payload(factors=zero))])
    np.testing.assert_array_equal(after.tensors["global/a/q"], state.tensors["global/a/q"])


def test_hetlora_refuses_a_rank_above_its_own():
    strategy = HetLoRA(rank=3)
    with pytest.raises(ValueError, match="must have one rank <= 3, got \\[4\\]"):
        strategy.aggregate(strategy.init(PLAIN, 0), mixed([(4, 1, 1.0, False)], PLAIN))


@pytest.mark.parametrize("name", ["hetlora", "flexlora"])
def test_the_largest_rank_of_the_fleet_sizes_the_adapter(name):
    strategy = HetLoRA() if name == "hetlora" else FlexLoRA()
    state = strategy.init(PLAIN, 0, reports([2, 8, 4]))
    tasks = strategy.plan(state, reports([2, 16]), 0)
    assert [task.rank for task in tasks] == [2, 8]
    assert strategy.plan_evaluation(state, reports([2]), 0)[0].start.factors["q"].rank == 8


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 16.0])
def test_every_task_carries_the_recipes_scaling(rslora, alpha):
    scaling = Scaling(alpha=alpha, rslora=rslora)
    for strategy in (Flora(scaling=scaling), HetLoRA(scaling=scaling, rank=4), FlexLoRA(scaling=scaling, rank=4)):
        task = strategy.plan(strategy.init(PLAIN, 0), reports([4]), 0)[0]
        assert (task.alpha, task.rslora) == (alpha or 8.0, rslora)
        for term in task.start.factors.values():
            assert (term.alpha, term.rslora) == (task.alpha, rslora)


def clipped(update, limit, before=None):
    before = before or dense_of(Payload())
    now = dense_of(update.payload)
    change = {name: now[name] - (0 if name in SPEC.dense else before[name]) for name in now}
    norm = np.sqrt(sum(np.sum(x**2) for x in change.values()))
    return {name: x * min(1.0, limit / norm) for name, x in change.items()}


@pytest.mark.parametrize("strategy", [Flora(clip_norm=20.0), Fedloom(clip_norm=20.0, rank_cap=24)])
def test_clipping_scales_a_delta_by_its_product_norm(strategy):
    updates = mixed([(2, 1, 0.1, False), (4, 3, 400.0, False)], SPEC)
    state = strategy.aggregate(strategy.init(SPEC, 0), updates)
    parts = [clipped(u, 20.0) for u in updates]
    close(dense_of(strategy.adapter(state)), {n: 0.25 * parts[0][n] + 0.75 * parts[1][n] for n in parts[0]})


def test_flexlora_clips_the_change_from_what_was_given():
    strategy, free, rng = FlexLoRA(clip_norm=5.0, rank=20), FlexLoRA(rank=20), np.random.default_rng(0)
    state = free.aggregate(free.init(SPEC, 0), mixed([(4, 1, 8.0, False)], SPEC))
    updates = answers(strategy, state, reports([3, 6]), SPEC, rng)
    total = None
    for update in updates:
        rank = update.payload.factors["q"].rank
        given = dense_of(free.plan(state, reports([rank]), 0)[0].start)
        change = clipped(update, 5.0, given)
        part = {n: update.examples / 7 * (given[n] + change[n]) for n in change}
        total = part if total is None else {n: total[n] + part[n] for n in part}
    total["head.weight"] += dense_of(free.adapter(state))["head.weight"]
    close(dense_of(strategy.adapter(strategy.aggregate(state, updates))), total)


@pytest.mark.parametrize("strategy", [FedIT(rank=3), FFA(rank=3), HetLoRA(rank=3)])
def test_means_clip_to_exactly_the_norm_of_the_products_change(strategy):
    rng = np.random.default_rng(0)
    state = strategy.init(SPEC, 0, reports([3]))
    state = strategy.aggregate(state, answers(strategy, state, reports([3, 3]), SPEC, rng))
    update = answers(strategy, state, reports([3]), SPEC, rng)
    before = dense_of(strategy.adapter(state))

    def change(clip_norm):
        after = replace(strategy, clip_norm=clip_norm).aggregate(state, update)
        now = dense_of(strategy.adapter(after))
        return np.sqrt(sum(np.sum((now[n] - before[n]) ** 2) for n in now))

    free = change(0.0)
    for limit in (0.01 * free, 0.5 * free, 0.9 * free):
        assert change(limit) == pytest.approx(limit, rel=1e-6)
    assert change(1.01 * free) == free


def test_a_rank_above_a_matrix_names_device_module_and_size():
    strategy = Fedloom()
    with pytest.raises(ValueError, match="rank of d1 must be <= 20 for c \\(40 x 20\\), got 21"):
        strategy.plan(strategy.init(PLAIN, 0), reports([4, 21]), 0)
    with pytest.raises(ValueError, match="rank of d0 must be >= 1, got 0"):
        strategy.plan(strategy.init(PLAIN, 0), reports([0]), 0)


def test_low_rank_terms_of_one_module_may_have_ranks_of_their_own():
    rng = np.random.default_rng(0)
    x, y = noise_payload(rng, PLAIN, 2, 3.0), noise_payload(rng, PLAIN, 5, 9.0)
    odd = Payload(factors={"q": x.factors["q"], "c": y.factors["c"]})
    updates = [update_of(odd, examples=2), update_of(y, "d1", 3)]
    strategy = Flora()
    close(
        dense_of(strategy.adapter(strategy.aggregate(strategy.init(PLAIN, 0), updates)), PLAIN),
        exact_mean(updates, PLAIN),
    )
    assert isinstance(odd.factors["q"], LowRank)
