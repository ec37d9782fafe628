"""Updates of pruned models against a dense float64 reference that goes index by index."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_fleet import (
    BOTH,
    CHANNELS,
    HALF,
    HEADS,
    SPEC,
    answers,
    clients,
    covered,
    dense_of_whole,
    keeps,
    mean_of,
    reference,
)
from toy_fleet import close, dense_of, merge, noise_payload, reports, update_of

from fedloom.protocols.messages import Axis, MatrixSpec, ModelSpec, Payload, Update
from fedloom.strategies.fedloom import Fedloom
from fedloom.strategies.flora import Flora
from fedloom.strategies.intake import product_sum
from fedloom.strategies.lowrank import Accumulator, delta_of
from fedloom.strategies.masked import scatter_payload, slice_payload
from fedloom.strategies.packing import unpack


@pytest.mark.parametrize(("dtype", "tol"), [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize("spec", [SPEC, BOTH], ids=["one side", "both sides"])
@settings(max_examples=60, deadline=None)
@given(parts=clients, seed=st.integers(0, 99))
def test_the_mean_is_over_the_devices_that_keep_an_entry(spec: Any, dtype: Any, tol: float, parts: Any, seed: int):
    updates = answers(parts, spec, dtype, seed)
    close(mean_of(updates, spec), reference(updates, spec), tol)


@settings(max_examples=30, deadline=None)
@given(parts=clients, order=st.randoms(use_true_random=False))
def test_order_does_not_matter(parts: Any, order: Any):
    updates = answers(parts)
    shuffled = order.sample(updates, len(updates))
    close(mean_of(shuffled), mean_of(updates), 1e-12)


@settings(max_examples=30, deadline=None)
@given(parts=clients, lost=st.integers(0, HEADS - 1), cap=st.sampled_from([2, 40]))
def test_what_nobody_keeps_stays_exactly_as_it_is(parts: Any, lost: int, cap: int):
    heads = np.arange(HEADS) != lost
    updates = answers([(r, n, alpha, {**keep, "heads": heads}) for r, n, alpha, keep in parts])
    models = [mean_of(updates)]
    for strategy in (Flora(), Fedloom(rank_cap=cap)):
        models.append(dense_of(strategy.adapter(strategy.aggregate(strategy.init(SPEC, 0), updates)), SPEC))
    for number, model in enumerate(models):
        for offset in (1, 9, 20):
            assert not model["qkv"][offset + 2 * lost : offset + 2 * lost + 2].any()
        nobodys = np.linalg.norm(model["o"][:, 5 * lost : 5 * lost + 5])
        rounding = 1e-14 * np.linalg.norm(model["o"])  # of the right singular vectors, once the sum is cut to a rank
        assert nobodys <= (rounding if number == 2 else 0.0)
        assert np.abs(model["qkv"]).sum() > 0


def plain_mean(updates: Sequence[Update], spec: ModelSpec) -> dict[str, Any]:
    """What the strategies computed before there were masks."""
    sums = {name: Accumulator(matrix) for name, matrix in spec.matrices.items()}
    for update in updates:
        for name, term in update.payload.factors.items():
            sums[name].add(term, float(update.examples) * 1.0)
    return {name: each.finish(float(sum(u.examples for u in updates))) for name, each in sums.items()}


@pytest.mark.parametrize("keep", [{}, {"heads": np.ones(HEADS, bool), "channels": np.ones(CHANNELS, bool)}])
@pytest.mark.parametrize("spec", [SPEC, BOTH], ids=["one side", "both sides"])
@pytest.mark.parametrize("count", [2, 40])
def test_whole_models_are_averaged_as_ever_bit_for_bit(spec: Any, keep: Any, count: int):
    updates = answers([(1 + i % 6, 3 + 7 * i, 0.3 + i, keep) for i in range(count)], spec, np.float32)
    wanted = plain_mean(updates, spec)
    for name, delta in product_sum(updates, spec, 0.0).matrices():
        assert (delta.factors is None) == (wanted[name].factors is None)
        np.testing.assert_array_equal(delta.to_dense(), wanted[name].to_dense())


@settings(max_examples=30, deadline=None)
@given(keep=keeps)
def test_one_device_alone_is_the_mean_of_what_it_keeps(keep: Any):
    (update,) = answers([(3, 17, 5.0, keep)])
    close(mean_of([update]), dense_of_whole(update.payload), 1e-14)


def test_a_pruned_side_keeps_the_rank_of_the_stack():
    keep = {"heads": np.array([True, False, False, True])}
    updates = answers([(2, 1, 2.0, keep), (3, 1, 2.0, {})])
    for _, delta in product_sum(updates, SPEC, 0.0).matrices():
        assert delta.factors is not None
        assert delta.factors.rank == 5
        assert delta.dense is None
    ((_, delta),) = product_sum(answers([(2, 1, 2.0, keep), (1, 1, 2.0, {})], BOTH), BOTH, 0.0).matrices()
    assert delta.factors is None
    assert delta.dense is not None


def without(update: Update, *modules: str) -> Update:
    factors = {name: term for name, term in update.payload.factors.items() if name not in modules}
    return replace(update, payload=replace(update.payload, factors=factors))


@settings(max_examples=20, deadline=None)
@given(parts=clients.filter(lambda parts: len(parts) > 2))
def test_each_module_is_averaged_over_the_devices_that_have_it(parts: Any):
    updates = answers(parts)
    updates = [without(updates[0], "qkv", "plain"), without(updates[1], "o", "plain"), *updates[2:]]
    updates = [without(update, "up") for update in updates]
    close(mean_of(updates, partial=True), reference(updates), 1e-12)
    assert not mean_of(updates, partial=True)["up"].any()
    for strategy in (Fedloom(rank_cap=40, partial=True), Flora(partial=True)):
        close(dense_of_whole(strategy.adapter(strategy.aggregate(strategy.init(SPEC, 0), updates))), reference(updates))
        with pytest.raises(ValueError, match="must carry an adapted module, got none"):
            strategy.aggregate(strategy.init(SPEC, 0), [without(updates[0], *SPEC.matrices)])
    with pytest.raises(ValueError, match="must carry each adapted module once"):
        mean_of(updates)


def random_keep(rng: np.random.Generator) -> dict[str, Any]:
    keep = {"heads": rng.random(HEADS) < 0.6, "channels": rng.random(CHANNELS) < 0.6}
    for group in keep.values():
        group[rng.integers(len(group))] = True
    return {group: value for group, value in keep.items() if rng.random() < 0.8}


@pytest.mark.parametrize("options", [{}, {"energy": 0.7}, {"rank_cap": 1}, {"server_lr": 0.5}])
def test_error_feedback_conserves_the_sum_of_pruned_rounds(options: Any):
    strategy = Fedloom(**{"rank_cap": 2, **options})
    rng = np.random.default_rng(0)
    state = strategy.init(SPEC, 0)
    total = dense_of_whole(Payload())
    for round in range(6):
        parts = [(1 + i, int(rng.integers(1, 50)), 4.0, random_keep(rng)) for i in range(1 + round % 4)]
        updates = answers(parts, seed=round)
        total = {name: total[name] + value for name, value in reference(updates).items()}
        state = strategy.aggregate(state, updates)
        kept = dense_of(strategy.adapter(state), SPEC)
        held = merge(kept, unpack("residual", state.tensors), SPEC)
        held.pop("coefficients")
        close(held, total, 1e-12)
    assert any(name.startswith("residual/") for name in state.tensors)
    assert strategy.plan(state, reports([2]), 9)[0].patch is not None


def test_clipping_counts_what_is_kept():
    keep = {"heads": np.array([True, False, True, False]), "channels": np.ones(CHANNELS, bool)}
    (update,) = answers([(3, 5, 4.0, keep)])
    (whole,) = [replace(update, payload=scatter_payload(update.payload, SPEC))]
    for strategy in (Fedloom(rank_cap=40, clip_norm=1.0), Flora(clip_norm=1.0)):
        one, other = (
            dense_of(strategy.adapter(strategy.aggregate(strategy.init(SPEC, 0), [u])), SPEC) for u in (update, whole)
        )
        close(one, other, 1e-12)
        assert sum(np.sum(x**2) for x in one.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("both", [False, True])
def test_memory_is_flat_in_the_number_of_devices(both: bool):
    rows, columns = Axis(group="heads", width=24), Axis(group="heads", width=20)
    matrix = MatrixSpec(d_out=96, d_in=80, rows=rows, columns=columns if both else None)
    spec = ModelSpec(base_hash="wide", matrices={"w": matrix}, groups={"heads": 4})
    strategy = Fedloom()

    def stream(count: int) -> Any:
        rng = np.random.default_rng(0)
        for i in range(count):
            keep = {"heads": np.arange(4) != i % 4}
            yield update_of(slice_payload(noise_payload(rng, spec, 4, 8.0), spec, keep), f"d{i}", 1 + i)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            strategy.aggregate(strategy.init(spec, 0), stream(count))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(200) < 1.3 * peak(20)


def test_zero_filling_would_be_another_mean():
    """Why the weights are by row: the plain mean of scattered updates shrinks what few devices keep."""
    updates = answers([(2, 1, 2.0, HALF), (2, 3, 2.0, {})])
    filled = [replace(u, payload=scatter_payload(u.payload, SPEC)) for u in updates]
    ours, naive = mean_of(updates)["qkv"], mean_of(filled)["qkv"]
    dropped = covered(SPEC.matrices["qkv"].rows, HALF, 29) == 0
    np.testing.assert_allclose(ours[dropped], naive[dropped] / 0.75)
    np.testing.assert_allclose(ours[~dropped], naive[~dropped])
    assert delta_of(filled[0].payload, "qkv").to_dense()[dropped].any() == np.False_
