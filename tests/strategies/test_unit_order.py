"""One order of a fleet's units: scores are averaged over who keeps them, and what went stays gone, for everyone."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_fleet import PRUNABLE, answer, noise_payload, reports, update_of
from unequal_fleet import transformer

from fedloom.protocols.messages import Payload, Start, Task
from fedloom.strategies.base import Workload
from fedloom.strategies.choosing import GroupKind, choose_keep, gone, wanted
from fedloom.strategies.fedspine import FedSpine, order_of
from fedloom.strategies.intake import check_update
from fedloom.strategies.masked import slice_payload
from fedloom.strategies.unequal import standing_of
from fedloom.strategies.unit_order import SCORES, UNIT_SCORES, Measured, UnitOrder, split, units_of

SPEC = transformer(layers=4)
UNITS = units_of(SPEC)


def some(rng, keep=None, weight=1.0):
    scores = {name: rng.uniform(0.1, 2, count) for name, count in SPEC.groups.items()}
    return Measured(scores=scores, keep=keep or {}, weight=weight)


def drops(keep):
    return {(name, int(unit)) for name, bits in keep.items() for unit in np.flatnonzero(~bits)}


def test_groups_are_placed_by_the_matrices_that_they_cut():
    assert UNITS.layers == 4
    for name, place in UNITS.groups.items():
        assert place.layer == int(name[0])
        assert place.kind is (GroupKind.ATTENTION if name.endswith("heads") else GroupKind.FFN)
    with pytest.raises(ValueError, match=r"must have an adapted module, 1\.channels has none"):
        units_of(PRUNABLE)
    with pytest.raises(ValueError, match="must have shapes"):
        units_of(replace(SPEC, shapes=None))


def test_scores_are_the_weighted_mean_over_who_keeps_the_unit_smoothed_over_rounds():
    rng = np.random.default_rng(0)
    keep = {"1.channels": np.arange(20) > 3}
    one, two = some(rng, keep, weight=3.0), some(rng, weight=1.0)
    order = UnitOrder().learned(UNITS, [one, two])
    a, b = one.scores["1.channels"], two.scores["1.channels"]
    np.testing.assert_allclose(order.scores["1.channels"], np.where(keep["1.channels"], (3 * a + b) / 4, b))
    nobody = {"1.channels": np.arange(20) > 0}
    three = some(rng, nobody)
    again = order.learned(UNITS, [three])
    np.testing.assert_allclose(
        again.scores["1.channels"][1:], (order.scores["1.channels"] + three.scores["1.channels"])[1:] / 2
    )
    assert again.scores["1.channels"][0] == order.scores["1.channels"][0]
    first = UnitOrder().learned(UNITS, [three])
    assert first.scores["1.channels"][0] == pytest.approx(three.scores["1.channels"][1:].mean())
    assert not UnitOrder().learned(UNITS, [])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0, 0.45), min_size=2, max_size=6))
def test_models_are_nested_whatever_is_learned_in_between(seed, ratios):
    """A device that was pruned in one round has lost nothing that one pruned further in a later round still has."""
    rng = np.random.default_rng(seed)
    order, before = UnitOrder().learned(UNITS, [some(rng)]), set()
    for ratio in np.maximum.accumulate(ratios):
        keep = order.keep(UNITS, ratio, {})
        assert gone(UNITS, keep) == wanted(UNITS, ratio)
        assert before <= drops(keep)
        assert all(bits.any() for bits in keep.values())
        assert not any(name.startswith("3.") for name, _ in drops(keep))  # the last layer is spared
        before = drops(keep)
        order = order.advanced(UNITS, [keep], 0.45).learned(UNITS, [some(rng, keep), some(rng, keep, 0.5)])
        arrays = {name: value.copy() for name, value in order.tensors().items()}
        again = UnitOrder.restore(arrays)
        assert drops(again.keep(UNITS, 0.45, {})) == drops(order.keep(UNITS, 0.45, {}))


def test_a_device_that_drops_what_nobody_asked_for_moves_the_order_no_further_than_the_target():
    order = UnitOrder().learned(UNITS, [some(np.random.default_rng(2))])
    greedy = {name: np.arange(count) == 0 for name, count in SPEC.groups.items()}
    went = order.advanced(UNITS, [greedy], 0.3).went
    assert drops({name: at == 0 for name, at in went.items()}) == drops(order.keep(UNITS, 0.3, {}))
    assert order.advanced(UNITS, [], 0.3).tensors().keys() == order.tensors().keys()
    assert not UnitOrder().advanced(UNITS, [greedy], 0.3)


def test_the_least_important_go_and_a_device_never_gets_back_what_it_lost():
    rng = np.random.default_rng(1)
    measured = some(rng)
    order = UnitOrder().learned(UNITS, [measured])
    keep = order.keep(UNITS, 0.2, {})
    free = [(measured.scores[n][u], n, u) for n in ("0.channels", "1.channels", "2.channels") for u in range(20)]
    assert {(n, u) for n, u in drops(keep) if "channels" in n} == {(n, u) for _, n, u in sorted(free)[:16]}
    odd = {"1.channels": np.arange(20) >= 10}
    assert drops(odd) <= drops(order.keep(UNITS, 0.3, odd))
    more = order.keep(UNITS, 0.01, odd)  # it has lost more than the ratio asks for
    assert drops(more) == drops(odd)
    with pytest.raises(ValueError, match="must have scores, got none"):
        UnitOrder().keep(UNITS, 0.2, {})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"0.heads": np.zeros(3, np.float32)}, "must score the units of each group, got a difference"),
        ({"0.channels": np.zeros(19, np.float32)}, r"must score 20 units of 0.channels, got float32 \(19,\)"),
        ({"0.channels": np.full(20, np.nan, np.float32)}, "finite scores >= 0 for 0.channels"),
        ({"0.channels": np.full(20, -1, np.float32)}, "finite scores >= 0 for 0.channels"),
        ({"0.channels": np.zeros(20, np.int64)}, "must score 20 units of 0.channels, got int64"),
    ],
)
def test_hostile_scores_are_refused(wrong, message):
    task = Task(device="d0", round=1, rank=2, alpha=4.0, start_from=Start.FRESH)
    update = answer(task, SPEC, np.random.default_rng(0), 3)
    scores = {SCORES + name: np.ones(count, np.float32) for name, count in SPEC.groups.items()}

    def sent(dense):
        return replace(update, payload=replace(update.payload, dense=dense))

    check_update(sent(scores), SPEC, masked=True)
    alone = wrong if "0.heads" in wrong else {**{n.removeprefix(SCORES): v for n, v in scores.items()}, **wrong}
    with pytest.raises(ValueError, match=message):
        check_update(sent({SCORES + name: value for name, value in alone.items()}), SPEC, masked=True)
    with pytest.raises(ValueError, match="must carry each trained head once"):
        check_update(sent(scores), SPEC)
    with pytest.raises(ValueError, match="must carry each trained head once"):
        check_update(sent(scores | {SCORES: np.ones(3, np.float32)}), replace(SPEC, groups={}))


def told(task, rng):
    """What a device answers: noise in what it keeps, and scores where it is asked for them."""
    ratio, keep = task.knobs["prune_ratio"], task.start.keep
    if any(count > gone(UNITS, keep)[kind] for kind, count in wanted(UNITS, ratio).items()):
        own = {name: rng.uniform(size=count) for name, count in SPEC.groups.items()}
        keep = choose_keep(UNITS, own, ratio, keep=keep)
    payload = slice_payload(noise_payload(rng, SPEC, task.rank, task.alpha), SPEC, keep)
    payload = Payload(factors=dict(payload.factors), keep=keep)
    if task.knobs.get(UNIT_SCORES):
        scores = {SCORES + name: rng.uniform(0.1, 2, count).astype(np.float32) for name, count in SPEC.groups.items()}
        payload = replace(payload, dense=scores)
    return update_of(payload, task.device, 3, task.round)


def rounds(strategy, count):
    state, devices = strategy.init(SPEC, 0), reports([8, 8, 4, 2])
    for round in range(1, count + 1):
        devices = [replace(report, version=state.version) for report in devices]
        tasks = strategy.plan(state, devices, round)
        yield round, state, tasks, strategy.plan_evaluation(state, devices, round)
        state = strategy.aggregate(
            state, [told(task, np.random.default_rng([round, i])) for i, task in enumerate(tasks)]
        )
    yield count + 1, state, [], []


def test_a_fleet_ends_with_one_model_and_each_alone_with_its_own():
    ends = {}
    for masks in ("fleet", "own"):
        strategy = FedSpine(work=Workload(batch=4, length=16, steps=2), ramp=4, target=0.3, masks=masks)
        *walked, (_, end, _, _) = rounds(strategy, 6)
        for round, _, tasks, judged in walked:
            for task in [*tasks, *judged]:
                left, asked = gone(UNITS, task.start.keep), wanted(UNITS, task.knobs["prune_ratio"])
                enough = all(left[kind] >= count for kind, count in asked.items())
                assert enough or masks == "own" or round == 1
            assert all((UNIT_SCORES in task.knobs) == (masks == "fleet") for task in tasks)
        ends[masks] = [drops(standing_of(end, f"d{i}").keep) for i in range(4)]
        assert bool(order_of(end)) == (masks == "fleet")
    same = {masks: np.mean([len(a & b) / len(a | b) for a in found for b in found]) for masks, found in ends.items()}
    assert same["fleet"] > 0.8 > same["own"]


def test_a_payload_without_scores_is_the_same_object():
    payload = Payload(dense={"head.weight": np.ones(3)})
    assert split(payload) == (payload, {})
