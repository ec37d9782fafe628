"""One table of checks that every strategy passes."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from conformance_cases import (
    CASES,
    FACTORS,
    MERGING,
    MIXED,
    ONE_IS_ALL,
    ONE_IS_ALL_SEEDS,
    SEEDS,
    UNEQUAL,
    WEIGHTED,
    begin,
    make,
    model,
    same,
    spec_for,
)
from pruned_fleet import covered
from safetensors.numpy import load, save
from toy_fleet import SPEC, answer, answers, close, dense_of, merge, noise_payload, reports, update_of

from fedloom.protocols.messages import Kind, LowRank, MatrixSpec, ModelSpec, Payload, Start
from fedloom.strategies.base import State, Strategy
from fedloom.strategies.ffa import drop_a, fill_a
from fedloom.strategies.masked import scatter_payload
from fedloom.strategies.registry import names


def test_the_table_has_every_strategy():
    assert {name for name, *_ in CASES.values()} == set(names())


@pytest.mark.parametrize("case", CASES)
def test_tasks_ask_each_device_for_what_it_can_do(case):
    strategy, devices, state, _ = begin(case)
    assert isinstance(strategy, Strategy)
    assert state.version == 2
    for plan, kind in ((strategy.plan, Kind.TRAIN), (strategy.plan_evaluation, Kind.EVALUATE)):
        tasks = plan(state, devices, 5)
        assert [(t.device, t.round, t.kind) for t in tasks] == [(d.device, 5, kind) for d in devices]
        for task, device in zip(tasks, devices, strict=True):
            assert task.alpha > 0
            assert task.state_round == device.state_round
            assert kind is Kind.EVALUATE or 1 <= task.rank <= device.rank
            assert (task.start_from is Start.GIVEN) == bool(task.start.factors)
            assert all(term.rank == task.rank for term in task.start.factors.values())
            assert task.send == (case != "local")


@pytest.mark.parametrize("case", MERGING)
def test_evaluation_is_of_the_full_global_model(case):
    """Of all that a device keeps of it, where it is pruned."""
    strategy, devices, state, _ = begin(case)
    late = [replace(d, version=0) for d in devices]
    for task in strategy.plan_evaluation(state, late, 2):
        got, spec = dense_of(Payload()), spec_for(case)
        if task.patch is not None:
            assert task.patch.since == 0
            got = merge(got, scatter_payload(task.patch.payload, spec))
        start = task.start
        if task.shared_a_seed is not None:
            start = fill_a(start, task.shared_a_seed, SPEC)
        wanted = model(strategy, state)
        for name, matrix in spec.matrices.items():
            wanted[name] *= covered(matrix.rows, task.start.keep, matrix.d_out)[:, None]
            wanted[name] *= covered(matrix.columns, task.start.keep, matrix.d_in)[None, :]
        close(merge(got, start), wanted, 1e-6)


@pytest.mark.parametrize("case", MERGING)
def test_order_does_not_matter(case):
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices, spec_for(case), rng)
    one = model(strategy, strategy.aggregate(state, updates))
    for _ in range(3):
        shuffled = [updates[i] for i in rng.permutation(len(updates))]
        close(model(strategy, strategy.aggregate(state, shuffled)), one, 1e-9)


@pytest.mark.parametrize("case", WEIGHTED)
def test_examples_weigh(case):
    """Three times the examples is three such devices; the unit does not matter."""
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices[:2], spec_for(case), rng)
    triple = [replace(updates[0], examples=3), replace(updates[1], examples=5)]
    copies = [replace(updates[0], examples=1)] * 3 + [replace(updates[1], examples=5)]
    scaled = [replace(u, examples=7 * u.examples) for u in triple]
    one = model(strategy, strategy.aggregate(state, triple))
    close(model(strategy, strategy.aggregate(state, copies)), one, 1e-9)
    close(model(strategy, strategy.aggregate(state, scaled)), one, 1e-9)


@pytest.mark.parametrize("case", ONE_IS_ALL + ONE_IS_ALL_SEEDS)
def test_one_device_alone_is_the_model(case):
    strategy, ranks = make(case)
    device = reports(ranks)[:1]
    state = strategy.init(spec_for(case), 0, device)
    update = answers(strategy, state, device, spec_for(case), np.random.default_rng(0))[0]
    payload = update.payload
    if case == "ffa":
        payload = fill_a(payload, 0, SPEC)
    close(model(strategy, strategy.aggregate(state, [update])), dense_of(payload), 1e-9)


@pytest.mark.parametrize("case", MERGING)
def test_updates_without_examples_do_not_count(case):
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices, spec_for(case), rng)
    silent = [replace(u, examples=0) if i in (1, 3) else u for i, u in enumerate(updates)]
    heard = [u for u in silent if u.examples]
    close(model(strategy, strategy.aggregate(state, silent)), model(strategy, strategy.aggregate(state, heard)), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_round_without_examples_is_refused(case):
    strategy, devices, state, rng = begin(case)
    updates = [replace(u, examples=0) for u in answers(strategy, state, devices, spec_for(case), rng)]
    for none in ([], updates):
        with pytest.raises(ValueError, match="at least one example, got none"):
            strategy.aggregate(state, none)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", FACTORS)
def test_dtype_follows_the_updates(case, dtype):
    _, _, state, _ = begin(case, dtype=dtype, rounds=3)
    assert {x.dtype for x in of_the_model(state).values()} == {np.dtype(dtype)}


def of_the_model(state):
    """The tensors that devices' updates went into."""
    return {name: x for name, x in state.tensors.items() if not name.startswith(("standing/", "fleet/", "order/"))}


@pytest.mark.parametrize("case", sorted(SEEDS))
def test_coefficients_are_kept_in_float64(case):
    _, _, state, _ = begin(case, dtype=np.float32)
    assert {x.dtype for x in state.tensors.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize("case", FACTORS)
def test_half_precision_updates_are_summed_in_float32(case):
    strategy, devices, state, rng = begin(case, rounds=1, dtype=np.float32)
    updates = answers(strategy, state, devices, spec_for(case), rng, dtype=np.float16)
    after = strategy.aggregate(state, updates)
    assert {x.dtype for x in of_the_model(after).values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("case", MERGING)
def test_float32_stays_close_to_float64(case):
    results = []
    for dtype in (np.float32, np.float64):
        strategy, devices, state, rng = begin(case, rounds=0)
        updates = answers(strategy, state, devices, spec_for(case), rng, dtype=np.float32)
        wide = [replace(u, payload=as_dtype(u.payload, dtype)) for u in updates]
        results.append(model(strategy, strategy.aggregate(state, wide)))
    close(*results, 2e-5)


def as_dtype(payload, dtype):
    factors = {
        name: LowRank(b=t.b.astype(dtype), a=t.a.astype(dtype), alpha=t.alpha, rslora=t.rslora)
        for name, t in payload.factors.items()
    }
    scalars = payload.scalars and replace(payload.scalars, values=payload.scalars.values.astype(dtype))
    dense = {name: x.astype(dtype) for name, x in payload.dense.items()}
    return replace(payload, factors=factors, dense=dense, scalars=scalars)


@pytest.mark.parametrize("case", CASES)
def test_a_stream_equals_a_list_bit_for_bit(case):
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices, spec_for(case), rng)
    same(strategy.aggregate(state, iter(updates)), strategy.aggregate(state, updates))
    same(strategy.aggregate(state, (u for u in updates)), strategy.aggregate(state, tuple(updates)))


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_goes_on_bit_for_bit(case):
    strategy, devices, state, rng = begin(case, rounds=3)
    meta = json.loads(json.dumps(state.meta))
    again = State(version=state.version, tensors=load(save(dict(state.tensors))), meta=meta)
    same(again, state)
    updates = answers(strategy, state, devices, spec_for(case), rng)
    same(strategy.aggregate(again, updates), strategy.aggregate(state, updates))
    for x, y in zip(strategy.plan(again, devices, 3), strategy.plan(state, devices, 3), strict=True):
        assert (x.device, x.rank, x.ranks, x.knobs) == (y.device, y.rank, y.ranks, y.knobs)
        for name in x.start.factors:
            np.testing.assert_array_equal(x.start.factors[name].b, y.start.factors[name].b)


@pytest.mark.parametrize("case", CASES)
def test_aggregate_leaves_the_state_and_the_updates_alone(case):
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices, spec_for(case), rng)
    before = {name: x.copy() for name, x in state.tensors.items()}
    sent = [{n: (t.b.copy(), t.a.copy()) for n, t in u.payload.factors.items()} for u in updates]
    strategy.aggregate(state, updates)
    for name, x in state.tensors.items():
        np.testing.assert_array_equal(x, before[name])
    for u, copy in zip(updates, sent, strict=True):
        for n, t in u.payload.factors.items():
            np.testing.assert_array_equal(t.b, copy[n][0])
            np.testing.assert_array_equal(t.a, copy[n][1])


WIDE = ModelSpec(base_hash="wide", matrices={"w": MatrixSpec(d_out=96, d_in=80)}, dense={"h": (64,)})


@pytest.mark.parametrize("case", [name for name in MERGING if name not in UNEQUAL])  # those: test_unequal.py
def test_memory_is_flat_in_the_number_of_devices(case):
    strategy, ranks = make(case)
    rank = min(ranks) + 3 if ranks == MIXED else 4
    state = strategy.init(WIDE, 0, reports([rank]))
    (task,) = strategy.plan(state, reports([rank]), 1)

    def stream(count):
        rng = np.random.default_rng(0)
        for i in range(count):
            if case in SEEDS:
                yield replace(answer(task, WIDE, rng, 1 + i), device=f"d{i}")
                continue
            payload = noise_payload(rng, WIDE, rank, 2.0 * rank)
            yield update_of(drop_a(payload) if case.startswith("ffa") else payload, f"d{i}", 1 + i)

    def peak(count):
        tracemalloc.start()
        try:
            strategy.aggregate(state, stream(count))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(200) < 1.3 * peak(20)


@pytest.mark.parametrize("case", MERGING)
def test_some_of_the_devices_are_enough(case):
    strategy, devices, state, rng = begin(case)
    for round, some in enumerate(([0], [4, 2], [1, 3, 0], [2]), start=2):
        cohort = [replace(devices[i], version=state.version) for i in some]
        state = strategy.aggregate(state, answers(strategy, state, cohort, spec_for(case), rng, round))
    assert state.version == 6
    assert all(np.isfinite(x).all() for x in of_the_model(state).values())
    for task, device in zip(strategy.plan(state, devices, 6), devices, strict=True):
        assert task.rank == device.rank or case in SEEDS or (case in UNEQUAL and task.rank <= device.rank)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", MERGING)
def test_a_late_joiner_reaches_the_same_model(case, dtype):
    """Whatever rounds a device missed, patch by patch or at once, it holds the same sum."""
    strategy, ranks = make(case)
    rng = np.random.default_rng(0)
    state = strategy.init(spec_for(case), 0, reports(ranks))
    held = {stride: (0, dense_of(Payload())) for stride in (1, 2, 5, 20)}
    for round in range(20):
        devices = reports(ranks, version=state.version)
        state = strategy.aggregate(state, answers(strategy, state, devices, spec_for(case), rng, round, dtype))
        for stride, (version, mine) in held.items():
            if (round + 1) % stride == 0:
                patch = strategy.catch_up(state, version)
                assert patch is not None
                assert patch.since in (0, version)
                mine = merge(dense_of(Payload()) if patch.since == 0 else mine, patch.payload)
                held[stride] = (patch.version, mine)
    for version, mine in held.values():
        assert version == 20
        close(mine, held[1][1], 1e-6)
        if case in SEEDS:  # whole numbers: to the last bit, where factors are to rounding
            np.testing.assert_array_equal(mine["coefficients"], model(strategy, state)["coefficients"])
            continue
        close({"h": mine["head.weight"]}, {"h": strategy.adapter(state).dense["head.weight"]}, 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_negative_count_is_refused(case):
    strategy, devices, state, rng = begin(case)
    bad = [replace(u, examples=-1) for u in answers(strategy, state, devices, spec_for(case), rng)]
    with pytest.raises(ValueError, match="must count examples >= 0, got -1"):
        strategy.aggregate(state, bad)


def test_local_neither_sends_nor_merges():
    strategy, devices, state, rng = begin("local")
    assert strategy.catch_up(state, 0) is None
    assert not state.tensors
    with pytest.raises(ValueError, match="got local"):
        strategy.adapter(state)
    with pytest.raises(ValueError, match="must carry no tensors"):
        strategy.aggregate(state, [update_of(noise_payload(rng, SPEC, 2, 1.0))])
    for task in (*strategy.plan(state, devices, 0), *strategy.plan_evaluation(state, devices, 0)):
        assert (task.start_from, task.patch) == (Start.OWN, None)
