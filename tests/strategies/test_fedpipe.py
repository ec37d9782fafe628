"""FedPipe: a warm-up, then for each device the best allocation within its memory and time, by brute force."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save
from toy_fleet import answer, close, dense_of, reports
from unequal_fleet import ran_out, transformer

from fedloom.protocols.messages import Cost, MatrixSpec, ModelSpec
from fedloom.server.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fedloom.server.intake import check_update
from fedloom.strategies.base import Scaling, State, Workload
from fedloom.strategies.cost import fixed, flops, flops_marginal, marginal, memory
from fedloom.strategies.fedpipe import FedPipe, speed
from fedloom.strategies.registry import build
from fedloom.strategies.unequal import BITS, FLOPS, MEASURE, NEED, SCORE

WORK = Workload(batch=4, length=16, steps=2)
SPEC = transformer(layers=2, targets=("q", "o", "down"))
RANKS = (8, 4, 2, 1)
SCORES = (5.0, 1.0, 0.5, 3.0, 0.2, 2.0)


def pipe(**options):
    return FedPipe(**{"work": WORK, "rank_cap": 40, "ranks": (2, 4, 8)} | options)


def fleet(memories, state, ranks=RANKS):
    devices = reports(ranks, version=state.version)
    return [replace(report, memory=int(lent)) for report, lent in zip(devices, memories, strict=True)]


def peak(ranks, batch=4, bits=16):
    return memory(SPEC.shapes, WORK.step(ranks, causal=True, batch=batch, bits=bits)).total


def uniform(rank):
    return dict.fromkeys(SPEC.matrices, rank)


def scored(scores):
    return dict(zip(SPEC.matrices, scores, strict=True))


def known(strategy, rate=1e6, **pipes):
    """A state in which every device has warmed up."""
    state = strategy.init(SPEC, 0)
    table = {f"d{i}": {"bits": 16, "rate": rate, "scores": scored(SCORES)} for i in range(4)}
    return replace(state, meta={**state.meta, "pipes": {name: table[name] | pipes.get(name, {}) for name in table}})


def measured(task, seed=0, seconds=2.0, scores=SCORES):
    """An answer of noise with these scores."""
    update = answer(task, SPEC, np.random.default_rng([seed, task.round, int(task.device[1])]), 3 + int(task.device[1]))
    told = dict(zip((SCORE + name for name in SPEC.matrices), scores, strict=True)) if MEASURE in task.knobs else {}
    return replace(update, metrics=update.metrics | told, cost=Cost(seconds=seconds))


def test_the_first_task_is_a_warm_up_at_one_rank_within_memory():
    strategy = pipe()
    state = strategy.init(SPEC, 0)
    tight = peak(uniform(1), batch=1, bits=4)
    lent = (0, peak(uniform(4), batch=2) + 10, peak(uniform(2), batch=1, bits=8), tight)
    tasks = strategy.plan(state, fleet(lent, state), 1)
    assert [(dict(t.ranks), t.knobs["batch_size"], t.knobs[BITS]) for t in tasks[:2]] == [
        (uniform(4), 4, 16),
        (uniform(4), 2, 16),
    ]
    for task, most in zip(tasks, lent, strict=True):
        assert len(set(task.ranks.values())) == 1
        assert task.ranks.keys() == SPEC.matrices.keys()
        need = peak(task.ranks, task.knobs["batch_size"], task.knobs[BITS])
        assert task.knobs[NEED] == need <= (most or np.inf)
        passes = WORK.steps * task.knobs["accumulate"]
        step = WORK.step(task.ranks, causal=True, batch=task.knobs["batch_size"], bits=task.knobs[BITS])
        assert task.knobs[FLOPS] == passes * flops(SPEC.shapes, step)
        assert task.knobs["batch_size"] * task.knobs["accumulate"] >= WORK.batch
        assert task.knobs[MEASURE] == 1
    with pytest.raises(
        ValueError, match=rf"nothing fits device d3: the smallest need is {tight} bytes, .* {tight - 1}"
    ):
        strategy.plan(state, fleet((0, 0, 0, tight - 1), state), 1)
    with pytest.raises(ValueError, match="rank of d0 must be >= 1, got 0"):
        strategy.plan(state, reports([0]), 1)


def brute(strategy, lent, seconds, rate, most):
    """The best value over every batch, bits and ranks within memory and time; ranks to `most`."""
    shapes, options = SPEC.shapes, [0, *(rank for rank in strategy.ranks if rank <= most)]
    best = -1.0
    for bits, batch in itertools.product((16, 8, 4), (4, 2, 1)):
        bare, passes = WORK.step({}, causal=True, batch=batch, bits=bits), WORK.steps * (4 // batch)
        worth = {16: 1.0, 8: strategy.worth_8, 4: strategy.worth_4}[bits]
        base, took = fixed(shapes, bare), flops(shapes, bare)
        needs = [[marginal(shapes, bare, name, rank) for rank in options] for name in SPEC.matrices]
        times = [[flops_marginal(shapes, bare, name, rank) for rank in options] for name in SPEC.matrices]
        gains = [[score / sum(SCORES) * (1 - 2 ** (-r / strategy.half)) for r in options] for score in SCORES]
        every = [sum(np.ix_(*(np.array(row) for row in rows))) for rows in (needs, times, gains)]
        fits = base + every[0] <= lent
        if seconds is not None:
            fits &= passes * (took + every[1]) / rate <= seconds * (1 + 1e-12)
        best = max(best, float(np.max(worth * every[2], where=fits, initial=-1.0)))
    return best


def value(strategy, chosen):
    worth = {16: 1.0, 8: strategy.worth_8, 4: strategy.worth_4}[chosen.bits]
    gains = (
        s * (1 - 2 ** (-chosen.ranks.get(m, 0) / strategy.half)) for m, s in zip(SPEC.matrices, SCORES, strict=True)
    )
    return worth * sum(gains) / sum(SCORES)


@pytest.mark.parametrize("pace", [0.0, 0.97, 1.0])
@pytest.mark.parametrize("room", [0.0, 0.2, 0.6])
def test_the_allocation_is_the_best_of_all_within_memory_and_time(pace, room):
    strategy = pipe(pace=pace, ranks=(2, 8))
    least, most = (fixed(SPEC.shapes, WORK.step({}, causal=True, batch=b, bits=k)) for b, k in ((1, 4), (4, 16)))
    lent, state = least + 4000 + room * (most - least), known(strategy)
    budget = pace * 2 * flops(SPEC.shapes, WORK.step(uniform(4), causal=True)) / 1e6 if pace else None
    chosen = strategy.allocate(state, fleet((lent, 0, 0, 0), state)[0])
    best = brute(strategy, lent, budget, 1e6, 8)
    assert chosen.memory == peak(chosen.ranks, chosen.batch, chosen.bits) <= lent
    if best > 0:
        assert value(strategy, chosen) == pytest.approx(best, rel=1e-9)
        assert budget is None or chosen.flops / 1e6 <= budget * (1 + 1e-9)
    else:  # the bare model takes longer than it may: the least that can be asked
        assert list(chosen.ranks.values()) == [2]


def test_bits_fall_only_where_memory_demands():
    strategy = pipe(pace=0.0)
    state = known(strategy)
    roomy = strategy.allocate(state, fleet((0, 0, 0, 0), state)[0])
    assert (roomy.bits, roomy.batch, dict(roomy.ranks)) == (16, 4, uniform(8))
    bare = WORK.step({}, causal=True)
    whole = fixed(SPEC.shapes, bare) + sum(marginal(SPEC.shapes, bare, name, 8) for name in SPEC.matrices)
    enough = strategy.allocate(state, fleet((whole, 0, 0, 0), state)[0])
    assert (enough.bits, enough.batch) == (16, 4)
    bits = []
    for lent in np.linspace(peak(uniform(1), 1, 4), whole, 12):
        bits.append(strategy.allocate(state, fleet((lent, 0, 0, 0), state)[0]).bits)
    assert (bits[0], bits[-1]) == (4, 16)


def test_a_slow_device_may_take_as_long_as_its_own_warm_up():
    strategy = pipe()
    state = known(strategy, d1={"rate": 1e5}, d2={"rate": 1e12})
    for report, rate in zip(fleet((0,) * 4, state, (8,) * 4), (1e6, 1e5, 1e12, 1e6), strict=True):
        chosen = strategy.allocate(state, report)
        warm = 2 * flops(SPEC.shapes, WORK.step(uniform(4), causal=True))
        assert chosen.flops / rate <= max(warm / 1e6, warm / rate) * (1 + 1e-9)
        assert len(chosen.ranks) >= 2


def test_modules_differ_and_each_is_averaged_over_the_devices_that_have_it():
    strategy, state = pipe(), None
    state = known(strategy, d1={"scores": scored(SCORES[::-1])}, d2={"scores": scored((0.0, 9.0, 0.0, 0.0, 0.0, 0.0))})
    tight = fixed(SPEC.shapes, WORK.step({}, causal=True)) + 4000
    tasks = strategy.plan(state, fleet((tight, tight, 0, 0), state), 2)
    assert len({frozenset(task.ranks) for task in tasks}) >= 3
    updates = [measured(task) for task in tasks]
    for update, task in zip(updates, tasks, strict=True):
        assert update.payload.factors.keys() == task.ranks.keys()
        check_update(update, task, SPEC)
    total = dense_of(strategy.adapter(strategy.aggregate(state, updates)), SPEC)
    want = {name: np.zeros((m.d_out, m.d_in)) for name, m in SPEC.matrices.items()}
    for name in SPEC.matrices:
        having = [update for update in updates if name in update.payload.factors]
        for update in having:
            term = update.payload.factors[name]
            share = update.examples / sum(other.examples for other in having)
            want[name] += share * term.scale * (term.b.astype(np.float64) @ term.a.astype(np.float64))
    close({name: total[name] for name in want}, want, 1e-10)


def test_a_bound_is_learned_where_memory_ran_out():
    strategy, needs = pipe(), []
    state = strategy.init(SPEC, 0)
    for round in range(1, 5):
        tasks = strategy.plan(state, fleet((0,) * 4, state), round)
        needs.append({task.device: task.knobs[NEED] for task in tasks})
        before = state
        state = strategy.aggregate(state, [ran_out(task) if t else measured(task) for t, task in enumerate(tasks)])
        assert state.meta["pipes"]["d1"]["bound"] == pytest.approx(0.95 * needs[-1]["d1"])
        assert state.version == before.version + 1
        assert MEASURE in tasks[1].knobs
    for earlier, later in itertools.pairwise(needs):
        assert all(later[name] <= 0.95 * earlier[name] for name in ("d1", "d2", "d3") if name in later)
    alone = strategy.aggregate(state, [ran_out(tasks[1])])
    assert alone.version == state.version
    assert strategy.catch_up(alone, 0) is not None
    idle = replace(measured(tasks[0]), examples=0)
    for updates in ([ran_out(tasks[1]), idle], [idle, ran_out(tasks[1])]):
        after = strategy.aggregate(state, updates)
        assert after.version == state.version
        assert after.meta["pipes"]["d1"]["bound"] == pytest.approx(0.95 * tasks[1].knobs[NEED])
    with pytest.raises(ValueError, match="at least one example, got none"):
        strategy.aggregate(state, [idle])


def test_a_device_that_runs_out_at_everything_gets_no_task_and_stops_nobody():
    strategy = pipe()
    state = known(strategy, d2={"bound": 10.0})
    assert [task.device for task in strategy.plan(state, fleet((0,) * 4, state), 3)] == ["d0", "d1", "d3"]
    with pytest.raises(ValueError, match="nothing fits device d1"):
        strategy.plan(state, fleet((0, 10, 0, 0), state), 3)


def test_an_update_that_lies_about_what_it_repeats_is_refused():
    strategy = pipe()
    state = strategy.init(SPEC, 0)
    task = strategy.plan(state, fleet((0,) * 4, state), 1)[0]
    good = measured(task)
    check_update(good, task, SPEC)
    check_update(ran_out(task), task, SPEC)
    for name in (NEED, FLOPS, BITS):
        for update in (good, ran_out(task)):
            other = {key: number for key, number in update.metrics.items() if key != name}
            for lie in (other, other | {name: update.metrics[name] + 1}):
                with pytest.raises(ValueError, match=f"metric '{name}' must be its task's"):
                    check_update(replace(update, metrics=lie), task, SPEC)


def test_a_checkpoint_in_the_middle_goes_on_as_if_nothing_had_happened(tmp_path):
    lent = (0, peak(uniform(4), 2), peak(uniform(2), 1, 8), peak(uniform(1), 1, 4))

    def play(state, first, last):
        told = []
        for round in range(first, last + 1):
            tasks = pipe().plan(state, fleet(lent, state), round)
            told.append([(t.device, t.rank, dict(t.ranks), dict(t.knobs)) for t in tasks])
            crash = [task.device == "d1" and round == 2 for task in tasks]
            answers = [measured(t, seconds=1.0 + i) for i, t in enumerate(tasks)]
            state = pipe().aggregate(
                state, [ran_out(t) if c else a for t, c, a in zip(tasks, crash, answers, strict=True)]
            )
        return told, state

    half, middle = play(pipe().init(SPEC, 0), 1, 2)
    rest, end = play(middle, 3, 4)
    assert MEASURE in half[0][0][3]
    assert MEASURE not in half[1][0][3]
    by_hand = State(version=2, tensors=load(save(dict(middle.tensors))), meta=json.loads(json.dumps(middle.meta)))
    assert by_hand.meta == middle.meta
    path = write_checkpoint(tmp_path, Checkpoint(run="r", round=2, state=middle, spec=SPEC, roster={}))
    for again in (by_hand, read_checkpoint(path).state):
        more, final = play(again, 3, 4)
        assert more == rest
        assert final.meta == end.meta
        for name, tensor in end.tensors.items():
            np.testing.assert_array_equal(final.tensors[name], tensor)


def test_a_rank_below_all_options_and_odd_words_are_taken():
    strategy = pipe()
    state = known(strategy)
    assert set(strategy.allocate(state, reports([1])[0]).ranks.values()) == {1}
    task = strategy.plan(strategy.init(SPEC, 0), reports([4]), 1)[0]
    for seconds, scores in ((0.0, SCORES), (1e-300, SCORES), (1e8, SCORES), (1.0, (0.0,) * 6), (1.0, (-1.0,) * 6)):
        after = strategy.aggregate(strategy.init(SPEC, 0), [measured(task, seconds=seconds, scores=scores)])
        json.dumps(after.meta, allow_nan=False)
        (coming,) = strategy.plan(after, reports([4]), 2)
        assert (MEASURE in coming.knobs) == (max(scores) <= 0)


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="told the model's shapes"):
        pipe().init(ModelSpec(base_hash="h", matrices={"w": MatrixSpec(d_out=4, d_in=4)}), 0)
    with pytest.raises(ValueError, match=r"shapes must have 0\.q"):
        pipe().init(replace(SPEC, shapes=replace(SPEC.shapes, linears={})), 0)
    for options, message in (
        ({"ranks": [4, 2]}, r"ranks must ascend from 1 or more, got \[4, 2\]"),
        ({"ranks": []}, "ranks must ascend"),
        ({"bits": [16, 5]}, r"bits must be of \[16, 8, 4\], got \[16, 5\]"),
        ({"worth_4": 1.0}, "0 < worth_4 <= worth_8 <= 1"),
        ({"half": 0.0}, "half must be > 0"),
        ({"pace": -1.0}, "pace >= 0"),
        ({"warmup_rank": 0}, "warmup_rank >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build("fedpipe", options, Scaling())
    assert build("fedpipe", {"ranks": [1, 3], "bits": [16]}, Scaling()).ranks == (1, 3)


def test_a_devices_speed_is_a_rate_and_what_every_pass_takes_beside_it():
    points = [(work, passes, work / 4e9 + 0.02 * passes) for work, passes in ((1e9, 8), (3e9, 8), (2e9, 32))]
    assert speed(points) == pytest.approx((4e9, 0.02))
    assert speed(points[:1]) == pytest.approx((1e9 / points[0][2], 0.0))  # one task tells no overhead
    assert speed([(1e9, 8, 1.0), (2e9, 16, 2.0)]) == pytest.approx((1e9, 0.0))  # nor do tasks that are alike
