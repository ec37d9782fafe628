"""FedSpine: what each device is told to prune and train, within its memory, and what its bandit makes of the answer."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from toy_fleet import answer, close, dense_of, reports
from unequal_fleet import ran_out, transformer

from fedloom.protocols.messages import Cost, DeviceReport, MatrixSpec, ModelSpec
from fedloom.server.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fedloom.strategies.bandit_reward import Reward
from fedloom.strategies.base import Scaling, State, Workload
from fedloom.strategies.cost import memory
from fedloom.strategies.fedspine import FedSpine
from fedloom.strategies.masked import covers, scatter_payload, slice_payload
from fedloom.strategies.patchlog import size
from fedloom.strategies.registry import build
from fedloom.strategies.sparsity import cubic, narrowed
from fedloom.strategies.unequal import DROP, PRUNE_RATIO, standing_of

SPEC = transformer(layers=2)
WORK = Workload(batch=4, length=16, steps=2)
RANKS = (8, 4, 2, 1)
POLICIES = ("tree", "grid", "random", "fixed")


def spine(**options):
    return FedSpine(**{"work": WORK, "ramp": 4, "rank_cap": 2, "error_feedback": False} | options)


def step(ranks):
    return WORK.step(ranks, causal=True)


def fleet(memories, state, ranks=RANKS):
    """Devices that lend these bytes, at the version that they must hold."""
    return [
        replace(report, memory=lent)
        for report, lent in zip(reports(ranks, version=state.version), memories, strict=True)
    ]


def answered(tasks, rng, spec=SPEC, crash=lambda task: False):
    """Answers of noise, or word that the memory ran out."""
    return [ran_out(task) if crash(task) else answer(task, spec, rng, 2 + i) for i, task in enumerate(tasks)]


def play(strategy, rounds, memories=(0, 0, 0, 0), state=None, first=1, crash=lambda task: False):
    """The tasks of each round, and the state after it; noise by the round alone."""
    state = state or strategy.init(SPEC, 5)
    asked, states = [], []
    for round in range(first, rounds + 1):
        asked.append(strategy.plan(state, fleet(memories, state), round))
        state = strategy.aggregate(state, answered(asked[-1], np.random.default_rng(round), crash=crash))
        states.append(state)
    return asked, states


def told(tasks):
    """All of a plan that a device acts on."""
    return [(t.device, t.rank, dict(t.knobs), {g: bits.tolist() for g, bits in t.start.keep.items()}) for t in tasks]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), shares=st.lists(st.floats(0.0, 1.2), min_size=4, max_size=4), oom=st.floats(0, 0.3))
def test_every_arm_is_within_memory_rank_and_schedule_and_the_end_is_the_target(policy, seed, shares, oom):
    strategy = spine(policy=policy, ramp=3, target=0.3)
    least, most = (strategy.need(SPEC, ratio, rank) for ratio, rank in ((0.3, 1), (0.0, 8)))
    memories = [int(least + share * (most - least)) for share in shares]
    rng, state, bounds = np.random.default_rng(seed), strategy.init(SPEC, seed), {}
    before = dict.fromkeys((f"d{i}" for i in range(4)), 0.0)
    for round in range(1, 7):
        tasks = strategy.plan(state, fleet(memories, state), round)
        if not tasks:
            return  # all ran out at everything
        for task in tasks:
            lent, rank = memories[int(task.device[1])], RANKS[int(task.device[1])]
            ratio = task.knobs[PRUNE_RATIO]
            small = narrowed(SPEC.shapes, ratio)
            assert 1 <= task.rank <= rank
            assert strategy.need(SPEC, ratio, task.rank) <= lent
            if task.rank <= 6:  # a pruned k or v may have no more rows than one head has
                assert memory(small, step(dict.fromkeys(SPEC.matrices, task.rank))).total <= lent
            assert 0.3 * min(round / 3, 1.0) ** 3 <= ratio <= 0.3
            assert ratio >= before[task.device]
            assert strategy.need(SPEC, ratio, task.rank) < bounds.get(task.device, np.inf)
            if round >= 3:
                assert ratio == 0.3
            elif ratio > cubic(round, 3, 0.3):  # sooner only where a middling rank does not fit
                middling = min(strategy.fixed_rank, rank)
                need = strategy.need(SPEC, max(cubic(round, 3, 0.3), before[task.device]), middling)
                assert need > lent or need >= bounds.get(task.device, np.inf)
        crashed = {task.device for task in tasks if rng.random() < oom}
        updates = answered(tasks, rng, crash=lambda task, crashed=crashed: task.device in crashed)
        after = strategy.aggregate(state, updates)
        for task in tasks:
            need = strategy.need(SPEC, task.knobs[PRUNE_RATIO], task.rank)
            if task.device in crashed:
                bounds[task.device] = need
            else:
                before[task.device] = standing_of(after, task.device).ratio
        assert after.version == state.version + (len(crashed) < len(tasks))
        state = after


def test_need_is_the_cost_of_the_narrowed_model_and_more_where_few_modules_are_adapted():
    for ratio, rank in ((0.0, 5), (0.2, 3), (0.3, 1)):
        whole = memory(narrowed(SPEC.shapes, ratio), step(dict.fromkeys(SPEC.matrices, rank))).total
        assert spine().need(SPEC, ratio, rank) == whole
        few = transformer(layers=2, targets=("q", "down"))
        part = memory(narrowed(few.shapes, ratio), step(dict.fromkeys(few.matrices, rank))).total
        assert part <= spine().need(few, ratio, rank) < whole
    needs = [spine().need(SPEC, 0.3, rank) for rank in (6, 12, 18)]  # ranks above a pruned side are no trouble
    assert needs[1] - needs[0] == needs[2] - needs[1] > 0


def test_an_impossible_floor_names_the_device_and_its_smallest_need():
    strategy = spine()
    state = strategy.init(SPEC, 0)
    least = strategy.need(SPEC, 0.3, 1)
    plan = strategy.plan(state, fleet([0, least, 0, 0], state), 1)
    assert (plan[1].knobs[PRUNE_RATIO], plan[1].rank) == (pytest.approx(0.3, abs=0.02), 1)
    message = rf"no arm fits device d1: the smallest need, ratio 0\.3 with rank 1, is {least} bytes, .* {least - 1}"
    with pytest.raises(ValueError, match=message):
        strategy.plan(state, fleet([0, least - 1, 0, 0], state), 1)
    with pytest.raises(ValueError, match=r"device d0 must have a ratio in .* and a rank in 1\.\.0"):
        strategy.plan(state, reports([0]), 1)


def test_nobody_prunes_more_than_its_memory_needs_before_units_are_known():
    lent = int(spine().need(SPEC, 0.1, 4))
    for masks, most in (("fleet", 0.3 / 4**3), ("own", cubic(1, 4, 0.3))):
        strategy = spine(masks=masks)
        assert strategy.room(1)[1] == pytest.approx(most)
        assert strategy.room(2)[1] == cubic(2, 4, 0.3)
        state = strategy.init(SPEC, 0)
        devices = fleet([0, 0, lent, lent], state, (2, 4, 8, 8))
        asked = [task.knobs[PRUNE_RATIO] for task in strategy.plan(state, devices, 1)]
        assert max(asked[:2]) <= most
        assert masks == "own" or min(asked[2:]) > most


def test_small_ranks_are_for_those_that_no_larger_one_fits():
    strategy = spine(min_rank=3, max_rank=8)
    state = strategy.init(SPEC, 0)
    small = int(strategy.need(SPEC, 0.3, 2))
    for round in range(1, 7):
        tasks = strategy.plan(state, fleet([0, small, 0, 0], state, (8, 8, 8, 2)), round)
        assert [task.rank >= 3 for task in tasks] == [True, False, True, False]
        state = strategy.aggregate(state, answered(tasks, np.random.default_rng(round)))


def test_ranks_stop_at_the_smallest_matrix():
    state = spine().init(SPEC, 0)
    most = {task.rank for seed in range(20) for task in spine(policy="random").plan(
        replace(state, meta={**state.meta, "seed": seed}), reports([64]), 1)}  # fmt: skip
    assert max(most) <= 18 == min(min(m.d_out, m.d_in) for m in SPEC.matrices.values())


def test_running_out_of_memory_leaves_the_model_alone_and_is_learned():
    strategy = spine(ramp=2)
    _, states = play(strategy, 3)
    state = states[-1]
    tasks = strategy.plan(state, fleet([0] * 4, state), 4)
    sound = answered(tasks, np.random.default_rng(0), crash=lambda task: task.device == "d1")
    mixed = strategy.aggregate(state, sound)
    alone = strategy.aggregate(state, [update for update in sound if update.device != "d1"])
    assert mixed.version == alone.version == 4
    close(dense_of(strategy.adapter(mixed), SPEC), dense_of(strategy.adapter(alone), SPEC), 0.0)
    one, before = standing_of(mixed, "d1"), standing_of(state, "d1")
    assert one.bandit.memory_bound == strategy.need(SPEC, tasks[1].knobs[PRUNE_RATIO], tasks[1].rank)
    assert (one.bandit.rewards[-1], one.ratio) == (0.0, before.ratio)
    for group, bits in before.allowed(SPEC).items():
        np.testing.assert_array_equal(one.allowed(SPEC)[group], bits)


def test_a_round_in_which_all_ran_out_goes_on_with_the_same_version():
    strategy = spine()
    _, states = play(strategy, 2)
    state, asked = states[-1], []
    for round in (3, 4):
        tasks = strategy.plan(state, fleet([0] * 4, state), round)
        asked.append({t.device: strategy.need(SPEC, t.knobs[PRUNE_RATIO], t.rank) for t in tasks})
        after = strategy.aggregate(state, [ran_out(task) for task in tasks])
        assert after.version == state.version == 2
        close(dense_of(strategy.adapter(after), SPEC), dense_of(strategy.adapter(state), SPEC), 0.0)
        for name, value in state.tensors.items():
            if not name.startswith("standing/"):
                np.testing.assert_array_equal(after.tensors[name], value)
        state = after
    assert asked[1]
    assert all(need < asked[0][device] for device, need in asked[1].items())


def test_a_device_that_runs_out_at_everything_is_left_out_and_stops_nobody():
    strategy = spine(ramp=1, max_rank=2, fixed_rank=1)
    state, crashed = strategy.init(SPEC, 0), 0
    for round in range(1, 8):
        tasks = strategy.plan(state, fleet([0] * 4, state), round)
        names = [task.device for task in tasks]
        crashed += "d2" in names
        assert [name for name in names if name != "d2"] == ["d0", "d1", "d3"]
        state = strategy.aggregate(
            state, answered(tasks, np.random.default_rng(round), crash=lambda task: task.device == "d2")
        )
    assert crashed <= 2
    assert state.version == 7
    assert strategy.plan(state, fleet([0] * 4, state)[2:3], 8) == []


@pytest.mark.parametrize(
    "left_out", [{}, {"reward_time": False}, {"reward_loss": False, "rho": 3.0, "loss_scale": 0.5}]
)
def test_rewards_are_the_equation_against_the_median(left_out):
    strategy = spine(**left_out)
    state = strategy.init(SPEC, 0)
    tasks = strategy.plan(state, fleet([0] * 4, state), 2)
    updates, seconds = (
        answered(tasks, np.random.default_rng(1), crash=lambda task: task.device == "d3"),
        (4.0, 1.0, 2.5),
    )
    updates = [
        replace(update, cost=Cost(seconds=s), metrics=update.metrics | {DROP: drop})
        for update, s, drop in zip(updates[:3], seconds, (0.3, -0.1, 7.0), strict=True)
    ] + updates[3:]
    after = strategy.aggregate(state, updates)
    options = {"time": not left_out, "loss": left_out.get("reward_loss", True)} | (
        {
            "time": left_out.get("reward_time", True),
            "rho": left_out.get("rho", 1.0),
            "scale": left_out.get("loss_scale", 2.0) * 0.3,  # the median of the three drops
        }
    )
    for update in updates[:3]:
        keep = update.payload.keep
        ratio = sum((~bits).sum() for bits in keep.values()) / sum(SPEC.groups.values())
        want = Reward(**options)(update.metrics[DROP], ratio / 0.3, update.cost.seconds, 2.5)
        bandit = standing_of(after, update.device).bandit
        assert bandit.rewards[-1] == pytest.approx(want, rel=1e-12)
        assert (bandit.ratios[-1], bandit.ranks[-1]) == (pytest.approx(ratio), tasks[int(update.device[1])].rank)
    if not left_out:
        drop, ratio = 0.3, standing_of(after, "d0").ratio
        by_hand = drop / 0.6 * (1 + ratio / 0.3) / 2 / (1 + 1.5 / 2.5)
        assert standing_of(after, "d0").bandit.rewards[-1] == pytest.approx(by_hand)
    assert standing_of(after, "d3").bandit.rewards[-1] == 0.0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpoint_in_the_middle_goes_on_as_if_nothing_had_happened(policy, tmp_path):
    def crash(task):
        return task.device == "d1" and task.round == 2

    memories = (0, 0, int(spine().need(SPEC, 0.1, 4)), 0)
    strategy = spine(policy=policy)
    asked, states = play(strategy, 6, memories, crash=crash)
    middle = states[2]
    by_hand = State(
        version=middle.version, tensors=load(save(dict(middle.tensors))), meta=json.loads(json.dumps(middle.meta))
    )
    assert by_hand.meta == middle.meta
    path = write_checkpoint(
        tmp_path, Checkpoint(run="r", round=3, state=middle, spec=SPEC, roster={"d0": [3, 0]}, ledger={})
    )
    found = read_checkpoint(path)
    assert found.spec == SPEC
    for again in (by_hand, found.state):
        more, ends = play(spine(policy=policy), 6, memories, state=again, first=4, crash=crash)
        assert [told(tasks) for tasks in more] == [told(tasks) for tasks in asked[3:]]
        assert ends[-1].meta == states[-1].meta
        assert ends[-1].tensors.keys() == states[-1].tensors.keys()
        for name, value in states[-1].tensors.items():
            np.testing.assert_array_equal(ends[-1].tensors[name], value)


def test_evaluation_is_of_each_device_as_it_stands():
    strategy = spine(ramp=2)
    _, states = play(strategy, 3)
    newcomer = DeviceReport(device="new", examples=1, rank=2)
    tasks = strategy.plan_evaluation(states[-1], [*reports(RANKS, version=3), newcomer], 3)
    for task in tasks[:4]:
        standing = standing_of(states[-1], task.device)
        for group, bits in standing.keep.items():
            np.testing.assert_array_equal(task.start.keep[group], bits)
        assert task.knobs[PRUNE_RATIO] == 0.3 >= standing.ratio
    assert all(bits.all() for bits in tasks[4].start.keep.values())
    assert strategy.plan_evaluation(strategy.init(SPEC, 0), [newcomer], 0)[0].knobs[PRUNE_RATIO] == 0.0


def test_a_device_is_sent_its_slice_of_what_it_missed():
    """At every version that it may hold, to train and to evaluate; one that never pruned shares the whole patch."""
    strategy = spine(ramp=2)
    _, states = play(strategy, 4)
    state = states[-1]
    for missed in (1, 2, 4):
        whole = strategy.catch_up(state, 4 - missed)
        newcomers = [replace(report, device=f"new {report.device}") for report in reports([2, 2])]
        devices = [replace(report, version=4 - missed) for report in [*reports(RANKS), *newcomers]]
        for plan in (strategy.plan, strategy.plan_evaluation):
            *pruned_ones, first, second = plan(state, devices, 5)
            for task in pruned_ones:
                wanted = slice_payload(whole.payload, SPEC, standing_of(state, task.device).keep)
                got = task.patch.payload
                assert (task.patch.since, task.patch.version) == (whole.since, 4)
                assert list(got.factors) == list(wanted.factors)
                assert size(got) == size(wanted) < 0.9 * size(whole.payload)
                close(dense_of(scatter_payload(got, SPEC), SPEC), dense_of(scatter_payload(wanted, SPEC), SPEC), 0.0)
                for group, bits in standing_of(state, task.device).allowed(SPEC).items():
                    np.testing.assert_array_equal(got.keep[group], bits)
                assert covers(got.keep, task.start.keep)  # to do it with less is not to have answered yet
            assert first.patch.payload is second.patch.payload
            assert not first.patch.payload.keep
            close(dense_of(first.patch.payload, SPEC), dense_of(whole.payload, SPEC), 0.0)
    for task in strategy.plan(state, reports(RANKS, version=4), 5):
        assert (task.patch.since, task.patch.version, bool(task.patch.payload)) == (4, 4, False)


def test_names_with_slashes_are_told_apart():
    strategy, names = spine(ramp=1), ["a", "a/b", "a/keep", ""]
    state = strategy.init(SPEC, 0)
    for round in (1, 2):
        devices = [replace(r, device=name) for r, name in zip(fleet([0] * 4, state), names, strict=True)]
        tasks = strategy.plan(state, devices, round)
        updates = answered(tasks, np.random.default_rng(round))
        state = strategy.aggregate(state, updates)
    for update in updates:
        for group, bits in update.payload.keep.items():
            np.testing.assert_array_equal(standing_of(state, update.device).keep[group], bits)


def test_models_that_cannot_be_pruned_are_refused():
    strategy = spine()
    bare = ModelSpec(base_hash="h", matrices={"w": MatrixSpec(d_out=4, d_in=4)})
    linears = dict(SPEC.shapes.linears)
    for spec, message in (
        (bare, 'set model.describe = "units"'),
        (replace(SPEC, groups={}), 'set model.describe = "units"'),
        (replace(SPEC, shapes=None), 'set model.describe = "units"'),
        (transformer(layers=1), r"target must be <= 0\.000 for this model .* got 0\.3"),
        (transformer(kv=1, ffn=1), r"target must be <= 0\.000"),
        (replace(SPEC, shapes=replace(SPEC.shapes, linears={})), "shapes must have 0.q at 36 x 24, got none"),
        (
            replace(SPEC, shapes=replace(SPEC.shapes, linears=linears | {"1.o": replace(linears["1.o"], d_in=35)})),
            "shapes must have 1.o at 24 x 36, got 24 x 35",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            strategy.init(spec, 0)
    for options, message in (
        ({"target": 1.0}, r"target must be in \(0, 1\) and ramp >= 1, got 1\.0"),
        ({"ramp": 0}, "ramp >= 1, got .* and 0"),
        ({"fixed_rank": 33}, r"fixed_rank must be in 1\.\.max_rank, got 33 and 16"),
        ({"loss_scale": 0.0}, "scale must be > 0"),
        ({"min_rank": 0}, "min_rank must be >= 1, got 0"),
        ({"share": 2.0}, r"share must be in \[0, 1\], got 2\.0"),
        ({"discount": 0.0}, r"discount and theta must be in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            build("fedspine", options, Scaling())


def test_answers_of_no_examples_beside_one_that_ran_out_change_nothing_but_what_is_learned():
    strategy = spine()
    _, states = play(strategy, 2)
    state = states[-1]
    tasks = strategy.plan(state, fleet([0] * 4, state), 3)
    idle = [replace(update, examples=0) for update in answered(tasks[1:], np.random.default_rng(0))]
    for updates in ([ran_out(tasks[0]), *idle], [*idle, ran_out(tasks[0])]):
        after = strategy.aggregate(state, updates)
        assert after.version == state.version
        close(dense_of(strategy.adapter(after), SPEC), dense_of(strategy.adapter(state), SPEC), 0.0)
        arm = strategy.need(SPEC, tasks[0].knobs[PRUNE_RATIO], tasks[0].rank)
        assert standing_of(after, "d0").bandit.memory_bound == arm
    with pytest.raises(ValueError, match="at least one example, got none"):
        strategy.aggregate(state, idle)
    torn = replace(idle[0], payload=replace(idle[0].payload, factors={}))
    with pytest.raises(ValueError, match="must carry each adapted module once"):
        strategy.aggregate(state, [torn, ran_out(tasks[0])])
