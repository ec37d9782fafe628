"""One table of checks that every strategy passes."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save
from toy_fleet import SPEC, STEPS, K, answer, answers, close, dense_of, merge, noise_payload, reports, update_of

from fedloom.protocols.messages import Kind, LowRank, MatrixSpec, ModelSpec, Over, Payload, Scalars, Start
from fedloom.strategies.base import Scaling, State, Strategy
from fedloom.strategies.ffa import drop_a, fill_a
from fedloom.strategies.registry import build, names

FINE = {"k": K, "downlink_bits": 40}  # rounding is tested in test_coefficients.py
MIXED, EQUAL = (8, 4, 2, 1, 6), (4, 4, 4, 4, 4)
CASES = {
    "fedloom": ("fedloom", {"rank_cap": 20}, MIXED),
    "fedloom capped": ("fedloom", {"rank_cap": 3}, MIXED),
    "fedloom momentum": ("fedloom", {"rank_cap": 3, "server_optimizer": "fedavgm"}, MIXED),
    "fedloom energy, residual cut": ("fedloom", {"rank_cap": 8, "energy": 0.8, "residual_rank": 4}, MIXED),
    "flora": ("flora", {}, MIXED),
    "flora clipped": ("flora", {"clip_norm": 3.0}, MIXED),
    "flora momentum": ("flora", {"server_optimizer": "fedavgm"}, MIXED),
    "flexlora": ("flexlora", {}, MIXED),
    "flexlora clipped, momentum": ("flexlora", {"clip_norm": 3.0, "server_optimizer": "fedavgm"}, MIXED),
    "hetlora": ("hetlora", {}, MIXED),
    "hetlora by examples": ("hetlora", {"weights": "examples"}, MIXED),
    "hetlora fedadam": ("hetlora", {"server_optimizer": "fedadam", "weights": "examples"}, MIXED),
    "fedit": ("fedit", {}, EQUAL),
    "fedit fedadam": ("fedit", {"server_optimizer": "fedadam"}, EQUAL),
    "fedit clipped": ("fedit", {"clip_norm": 2.0}, EQUAL),
    "ffa": ("ffa", {}, EQUAL),
    "ffa fedavgm": ("ffa", {"server_optimizer": "fedavgm"}, EQUAL),
    "fedkseed": ("fedkseed", FINE, MIXED),
    "fedkseed gaussian, adapters": ("fedkseed", FINE | {"family": "gaussian", "scope": "lora"}, MIXED),
    "fedkseed clipped, momentum": ("fedkseed", FINE | {"clip_norm": 1.0, "server_optimizer": "fedavgm"}, MIXED),
    "fedkseed_pro": ("fedkseed_pro", FINE | {"draws": STEPS}, MIXED),
    "fedkseed_pro corrected": ("fedkseed_pro", FINE | {"draws": STEPS, "correct": True}, MIXED),
    "decomfl": ("decomfl", FINE, MIXED),
    "sketch": ("sketch", FINE, MIXED),
    "sketch mixed fleet": ("sketch", FINE | {"exchange": "gradient"}, MIXED),
    "sketch fedadam": ("sketch", FINE | {"exchange": "gradient", "server_optimizer": "fedadam"}, MIXED),
    "local": ("local", {}, MIXED),
}
SEEDS = {name for name in CASES if name.startswith(("fedkseed", "decomfl", "sketch"))}
FORWARD = {"sketch mixed fleet": (1, 3), "sketch fedadam": (0, 1)}
MERGING = {name: case for name, case in CASES.items() if name != "local"}
FACTORS = [name for name in MERGING if name not in SEEDS]
ONE_IS_ALL = ["fedloom", "flora", "flexlora", "hetlora", "fedit", "ffa"]
ONE_IS_ALL_SEEDS = ["fedkseed", "fedkseed_pro", "decomfl", "sketch"]
WEIGHTED = [name for name in MERGING if name not in ("hetlora", "decomfl")]


def make(case):
    name, options, ranks = CASES[case]
    return build(name, options, Scaling()), ranks


def fleet(case, version=0):
    """The devices of a case."""
    return reports(CASES[case][2], version=version, forward=FORWARD.get(case, ()))


def begin(case, spec=SPEC, rounds=2, dtype=np.float64, seed=0):
    """A strategy, its devices and its state after a few rounds."""
    strategy, _ = make(case)
    rng = np.random.default_rng(seed)
    state = strategy.init(spec, seed, fleet(case))
    for round in range(rounds):
        devices = fleet(case, version=state.version)
        state = strategy.aggregate(state, answers(strategy, state, devices, spec, rng, round, dtype))
    return strategy, fleet(case, version=state.version), state, rng


def model(strategy, state, spec=SPEC):
    return dense_of(strategy.adapter(state), spec)


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
    strategy, devices, state, _ = begin(case)
    late = [replace(d, version=0) for d in devices]
    for task in strategy.plan_evaluation(state, late, 2):
        got = dense_of(Payload())
        if task.patch is not None:
            assert task.patch.since == 0
            got = merge(got, task.patch.payload)
        start = task.start
        if task.shared_a_seed is not None:
            start = fill_a(start, task.shared_a_seed, SPEC)
        close(merge(got, start), model(strategy, state), 1e-6)


@pytest.mark.parametrize("case", MERGING)
def test_order_does_not_matter(case):
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices, SPEC, rng)
    one = model(strategy, strategy.aggregate(state, updates))
    for _ in range(3):
        shuffled = [updates[i] for i in rng.permutation(len(updates))]
        close(model(strategy, strategy.aggregate(state, shuffled)), one, 1e-9)


@pytest.mark.parametrize("case", WEIGHTED)
def test_examples_weigh(case):
    """Three times the examples is three such devices; the unit does not matter."""
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices[:2], SPEC, rng)
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
    state = strategy.init(SPEC, 0, device)
    update = answers(strategy, state, device, SPEC, np.random.default_rng(0))[0]
    payload = update.payload
    if case == "ffa":
        payload = fill_a(payload, 0, SPEC)
    close(model(strategy, strategy.aggregate(state, [update])), dense_of(payload), 1e-9)


@pytest.mark.parametrize("case", MERGING)
def test_updates_without_examples_do_not_count(case):
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices, SPEC, rng)
    silent = [replace(u, examples=0) if i in (1, 3) else u for i, u in enumerate(updates)]
    heard = [u for u in silent if u.examples]
    close(model(strategy, strategy.aggregate(state, silent)), model(strategy, strategy.aggregate(state, heard)), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_round_without_examples_is_refused(case):
    strategy, devices, state, rng = begin(case)
    updates = [replace(u, examples=0) for u in answers(strategy, state, devices, SPEC, rng)]
    for none in ([], updates):
        with pytest.raises(ValueError, match="at least one example, got none"):
            strategy.aggregate(state, none)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", FACTORS)
def test_dtype_follows_the_updates(case, dtype):
    _, _, state, _ = begin(case, dtype=dtype, rounds=3)
    assert {x.dtype for x in state.tensors.values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("case", sorted(SEEDS))
def test_coefficients_are_kept_in_float64(case):
    _, _, state, _ = begin(case, dtype=np.float32)
    assert {x.dtype for x in state.tensors.values()} == {np.dtype(np.float64)}


@pytest.mark.parametrize("case", FACTORS)
def test_half_precision_updates_are_summed_in_float32(case):
    strategy, devices, state, rng = begin(case, rounds=1, dtype=np.float32)
    updates = answers(strategy, state, devices, SPEC, rng, dtype=np.float16)
    after = strategy.aggregate(state, updates)
    assert {x.dtype for x in after.tensors.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("case", MERGING)
def test_float32_stays_close_to_float64(case):
    results = []
    for dtype in (np.float32, np.float64):
        strategy, devices, state, rng = begin(case, rounds=0)
        updates = answers(strategy, state, devices, SPEC, rng, dtype=np.float32)
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
    return Payload(factors=factors, dense=dense, scalars=scalars)


@pytest.mark.parametrize("case", CASES)
def test_a_stream_equals_a_list_bit_for_bit(case):
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices, SPEC, rng)
    same(strategy.aggregate(state, iter(updates)), strategy.aggregate(state, updates))
    same(strategy.aggregate(state, (u for u in updates)), strategy.aggregate(state, tuple(updates)))


def same(x, y):
    assert (x.version, x.meta) == (y.version, y.meta)
    assert x.tensors.keys() == y.tensors.keys()
    for name in x.tensors:
        np.testing.assert_array_equal(x.tensors[name], y.tensors[name], err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_goes_on_bit_for_bit(case):
    strategy, devices, state, rng = begin(case, rounds=3)
    meta = json.loads(json.dumps(state.meta))
    again = State(version=state.version, tensors=load(save(dict(state.tensors))), meta=meta)
    same(again, state)
    updates = answers(strategy, state, devices, SPEC, rng)
    same(strategy.aggregate(again, updates), strategy.aggregate(state, updates))
    for x, y in zip(strategy.plan(again, devices, 3), strategy.plan(state, devices, 3), strict=True):
        assert x.rank == y.rank
        for name in x.start.factors:
            np.testing.assert_array_equal(x.start.factors[name].b, y.start.factors[name].b)


@pytest.mark.parametrize("case", CASES)
def test_aggregate_leaves_the_state_and_the_updates_alone(case):
    strategy, devices, state, rng = begin(case)
    updates = answers(strategy, state, devices, SPEC, rng)
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


@pytest.mark.parametrize("case", MERGING)
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
    for round, some in enumerate(([0], [4, 2], [1, 3, 0], [2])):
        cohort = [replace(devices[i], version=state.version) for i in some]
        state = strategy.aggregate(state, answers(strategy, state, cohort, SPEC, rng, round))
    assert state.version == 6
    assert all(np.isfinite(x).all() for x in state.tensors.values())
    for task, device in zip(strategy.plan(state, devices, 6), devices, strict=True):
        assert task.rank == device.rank or case in SEEDS


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", MERGING)
def test_a_late_joiner_reaches_the_same_model(case, dtype):
    """Whatever rounds a device missed, patch by patch or at once, it holds the same sum."""
    strategy, ranks = make(case)
    rng = np.random.default_rng(0)
    state = strategy.init(SPEC, 0, reports(ranks))
    held = {stride: (0, dense_of(Payload())) for stride in (1, 2, 5, 20)}
    for round in range(20):
        devices = reports(ranks, version=state.version)
        state = strategy.aggregate(state, answers(strategy, state, devices, SPEC, rng, round, dtype))
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


def spoil(payload, fault):
    """A payload with one fault."""
    factors, dense = dict(payload.factors), dict(payload.dense)
    q = factors["q"]
    if fault == "missing module":
        del factors["q"]
    elif fault == "unknown module":
        factors["x"] = q
    elif fault == "wrong d_out":
        factors["q"] = replace(q, b=np.ones((23, q.rank)))
    elif fault == "wrong d_in":
        factors["q"] = replace(q, a=np.ones((q.rank, 41)))
    elif fault == "NaN":
        factors["q"] = replace(q, b=np.where(np.arange(q.rank) == 0, np.nan, q.b))
    elif fault == "integers":
        factors["q"] = replace(q, b=q.b.astype(np.int64))
    elif fault == "rank":
        factors["q"] = replace(q, b=np.ones((24, 25)), a=np.ones((25, q.a.shape[1])))
    elif fault in ("alpha 0", "alpha inf"):
        factors["q"] = replace(q, alpha=float(fault.split()[1]))
    elif fault == "missing head":
        dense = {}
    elif fault == "unknown head":
        dense["x"] = np.ones(3)
    elif fault == "wrong head":
        dense["head.weight"] = np.ones((5, 3))
    elif fault == "infinite head":
        dense["head.weight"] = np.full((3, 5), np.inf)
    return Payload(factors=factors, dense=dense)


FAULTS = {
    "missing module": "must carry each adapted module once",
    "unknown module": "must carry each adapted module once",
    "wrong d_out": "must have b \\[24, r\\]",
    "wrong d_in": "must have b \\[24, r\\]",
    "NaN": "must be finite for q",
    "integers": "must carry real floats for q, got int64",
    "rank": "must have a rank <= 24 for q, got 25",
    "alpha 0": "must have a finite alpha > 0 for q",
    "alpha inf": "must have a finite alpha > 0 for q",
    "missing head": "must carry each trained head once",
    "unknown head": "must carry each trained head once",
    "wrong head": "must have shape \\(3, 5\\) for head.weight",
    "infinite head": "must be finite for head.weight",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", ONE_IS_ALL)
def test_a_bad_update_is_refused_and_changes_nothing(case, fault):
    strategy, devices, state, rng = begin(case)
    before = {name: x.copy() for name, x in state.tensors.items()}
    good = answers(strategy, state, devices, SPEC, rng)
    bad = replace(good[1], payload=spoil(good[1].payload, fault))
    with pytest.raises(ValueError, match=f"update of d1 {FAULTS[fault]}"):
        strategy.aggregate(state, [good[0], bad, good[2]])
    for name, x in state.tensors.items():
        np.testing.assert_array_equal(x, before[name])
    same(strategy.aggregate(state, good), strategy.aggregate(state, good))


def spoil_scalars(scalars, fault):
    """Scalars with one fault."""
    values = scalars.values.copy()
    if fault == "NaN":
        values[0] = np.nan
        return replace(scalars, values=values)
    if fault == "past the limit":
        values[0] = 10.5
        return replace(scalars, values=values)
    if fault == "another k":
        return Scalars(over=Over.BASIS, k=2 * K, values=np.ones(2 * K))
    if fault == "too few coordinates":
        return Scalars(over=Over.BASIS, k=K, values=np.ones(K - 1))
    if fault == "index out of range":
        return Scalars(over=Over.POOL, k=K, values=np.ones(1), indices=np.array([K]))
    return None


SCALAR_FAULTS = {
    "NaN": "must carry finite scalars",
    "past the limit": r"must carry scalars within \+-10, got 10.5",
    "another k": f"of {K}, got basis of {2 * K}",
    "too few coordinates": f"must carry {K} coordinates, got {K - 1}|must carry scalars over pool",
    "index out of range": f"must carry seed indices in 0..{K - 1}, got {K}|must carry scalars over steps or basis",
    "nothing": "must carry scalars and nothing else",
    "tensors beside": "must carry scalars and nothing else",
}


@pytest.mark.parametrize("fault", SCALAR_FAULTS)
@pytest.mark.parametrize("case", ONE_IS_ALL_SEEDS)
def test_bad_scalars_are_refused_and_change_nothing(case, fault):
    name, options, _ = CASES[case]
    strategy = build(name, options | {"scalar_limit": 10.0}, Scaling())
    _, devices, state, rng = begin(case)
    good = answers(strategy, state, devices, SPEC, rng)
    payload = good[1].payload
    bad = replace(payload, scalars=spoil_scalars(payload.scalars, fault))
    if fault == "tensors beside":
        bad = replace(payload, dense={"head.weight": np.ones((3, 5))})
    with pytest.raises(ValueError, match=f"update of d1 ({SCALAR_FAULTS[fault]}|.*{SCALAR_FAULTS[fault]})"):
        strategy.aggregate(state, [good[0], replace(good[1], payload=bad), good[2]])
    same(strategy.aggregate(state, good), strategy.aggregate(state, good))


@pytest.mark.parametrize("case", CASES)
def test_a_negative_count_is_refused(case):
    strategy, devices, state, rng = begin(case)
    bad = [replace(u, examples=-1) for u in answers(strategy, state, devices, SPEC, rng)]
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
