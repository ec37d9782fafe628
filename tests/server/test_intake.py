"""An update is let in only if it is a whole, finite answer to the task that was asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedloom.protocols.messages import (
    Axis,
    Cost,
    Kind,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Over,
    Payload,
    Refusal,
    Scalars,
    Start,
    Subspace,
    Task,
    Update,
)
from fedloom.server.intake import check_refusal, check_update

SPEC = ModelSpec(
    base_hash="h",
    matrices={"m": MatrixSpec(d_out=4, d_in=3), "n": MatrixSpec(d_out=2, d_in=3)},
    dense={"head": (2,)},
)
TASK = Task(device="x", round=3, rank=2, alpha=4.0, start_from=Start.FRESH, run="r", nonce=7)


def factor(d_out: int, d_in: int, rank: int = 2, **other: Any) -> LowRank:
    values = {"b": np.ones((d_out, rank)), "a": np.ones((rank, d_in)), "alpha": 4.0} | other
    return LowRank(**values)


GOOD = Update(
    device="x",
    round=3,
    examples=5,
    run="r",
    nonce=7,
    payload=Payload(factors={"m": factor(4, 3), "n": factor(2, 3)}, dense={"head": np.zeros(2)}),
)


def with_factors(**factors: LowRank) -> Update:
    return replace(GOOD, payload=replace(GOOD.payload, factors=dict(GOOD.payload.factors) | factors))


def test_a_good_update_passes() -> None:
    check_update(GOOD, TASK, SPEC)
    check_update(replace(GOOD, payload=Payload()), replace(TASK, send=False), SPEC)
    check_update(replace(GOOD, kind=Kind.EVALUATE, payload=Payload()), replace(TASK, kind=Kind.EVALUATE), SPEC)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (replace(GOOD, run="other"), "run must be its task's 'r', got 'other'"),
        (replace(GOOD, round=2), "round must be its task's 3, got 2"),
        (replace(GOOD, nonce=8), "nonce must be its task's 7, got 8"),
        (replace(GOOD, device="y"), "device must be"),
        (replace(GOOD, kind=Kind.EVALUATE), "kind must be"),
        (replace(GOOD, examples=-1), "examples >= 0, got -1"),
        (replace(GOOD, payload=Payload(dense=GOOD.payload.dense)), "each adapted module once"),
        (with_factors(extra=factor(4, 3)), "each adapted module once.*extra"),
        (with_factors(m=factor(3, 4)), r"must have b \[4, r\] and a \[r, 3\] for m"),
        (with_factors(m=factor(4, 3, rank=3)), "task's rank 2 and alpha 4, got rank 3"),
        (with_factors(m=factor(4, 3, alpha=5.0)), "got rank 2 and alpha 5"),
        (with_factors(m=factor(4, 3, rslora=True)), "task's rank"),
        (with_factors(m=factor(4, 3, b=np.full((4, 2), np.nan))), "must be finite for m"),
        (replace(GOOD, payload=replace(GOOD.payload, dense={})), "each trained head once"),
        (replace(GOOD, payload=replace(GOOD.payload, dense={"head": np.zeros(3)})), "for head, got"),
        (replace(GOOD, payload=replace(GOOD.payload, dense={"head": np.full(2, np.inf)})), "must be finite for head"),
    ],
)
def test_a_bad_update_is_refused(bad: Update, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_update(bad, TASK, SPEC)


def test_tensors_nobody_asked_for_are_refused() -> None:
    with pytest.raises(ValueError, match="asks for no tensors"):
        check_update(GOOD, replace(TASK, send=False), SPEC)


PRUNABLE = replace(
    SPEC,
    matrices={
        "m": MatrixSpec(d_out=4, d_in=3, rows=Axis(group="heads", width=2)),
        "n": MatrixSpec(d_out=2, d_in=3, columns=Axis(group="channels", width=1)),
    },
    groups={"heads": 2, "channels": 3},
)
FREE = {"heads": np.ones(2, bool), "channels": np.ones(3, bool)}
PRUNING = replace(TASK, start=Payload(keep=FREE))
NARROW = {"heads": np.array([False, True])}


def kept(m: LowRank, n: LowRank, **keep: Any) -> Update:
    bits = {group: np.array(value, bool) for group, value in keep.items()}
    return replace(GOOD, payload=replace(GOOD.payload, factors={"m": m, "n": n}, keep=bits))


def test_a_pruned_answer_passes_where_its_task_lets_it_prune() -> None:
    whole, half, third = factor(4, 3), factor(2, 3), factor(2, 1)
    check_update(GOOD, PRUNING, PRUNABLE)
    check_update(kept(half, third, heads=[1, 0], channels=[0, 0, 1]), PRUNING, PRUNABLE)
    check_update(kept(whole, factor(2, 3), heads=[1, 1]), PRUNING, PRUNABLE)
    narrowed = replace(TASK, start=Payload(keep=NARROW))
    check_update(kept(half, factor(2, 3), heads=[0, 1]), narrowed, PRUNABLE)


@pytest.mark.parametrize(
    ("task", "bad", "why"),
    [
        (TASK, kept(factor(2, 3), factor(2, 3), heads=[1, 0]), r"of the whole model, got one pruned in \['heads'\]"),
        (replace(TASK, start=Payload(keep=NARROW)), GOOD, "no unit of 'heads' that was dropped, got unit 0"),
        (
            replace(TASK, start=Payload(keep=NARROW)),
            kept(factor(2, 3), factor(2, 3), heads=[1, 0]),
            "no unit of 'heads' that was dropped, got unit 0",
        ),
        (
            replace(TASK, start=Payload(keep=NARROW)),
            kept(factor(2, 3), factor(2, 1), heads=[0, 1], channels=[1, 0, 0]),
            "must keep 'channels' whole, got a keep-bitmap of it",
        ),
        (PRUNING, kept(factor(4, 3), factor(2, 3), heads=[1, 0]), r"must have b \[2, r\] and a \[r, 3\] for m"),
        (PRUNING, kept(factor(2, 3), factor(2, 3), heads=[1, 1]), r"must have b \[4, r\] and a \[r, 3\] for m"),
        (PRUNING, kept(factor(4, 3), factor(2, 1), channels=[1, 1, 0]), r"must have b \[2, r\] and a \[r, 2\] for n"),
        (PRUNING, kept(factor(4, 3), factor(2, 3), heads=[1, 1, 1]), "must have 2 units, got 3"),
        (PRUNING, kept(factor(4, 3), factor(2, 3), heads=[0, 0]), "must keep at least one unit, got none"),
        (PRUNING, kept(factor(4, 3), factor(2, 3), legs=[1]), "must name groups of the model, got 'legs'"),
        (
            replace(PRUNING, send=False),
            replace(GOOD, payload=Payload(keep=NARROW)),
            "this task asks for no tensors, got some",
        ),
    ],
)
def test_a_badly_pruned_answer_is_refused(task: Task, bad: Update, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_update(bad, task, PRUNABLE)


def test_a_task_may_name_modules_and_their_ranks() -> None:
    task = replace(TASK, ranks={"m": 1})
    good = replace(GOOD, payload=replace(GOOD.payload, factors={"m": factor(4, 3, rank=1, alpha=2.0)}))
    check_update(good, task, SPEC)
    for bad, why in (
        (GOOD, r"the modules of its task's ranks, got a difference in \['n'\]"),
        (with_factors(m=factor(4, 3, rank=1, alpha=2.0)), r"difference in \['n'\]"),
        (replace(good, payload=replace(good.payload, factors={"n": factor(2, 3)})), r"difference in \['m', 'n'\]"),
        (replace(good, payload=replace(good.payload, factors={"m": factor(4, 3)})), "task's rank 1 and alpha 2, got"),
        (replace(good, payload=replace(good.payload, factors={"x": factor(4, 3)})), "each adapted module once"),
        (replace(good, payload=replace(good.payload, factors={})), "must carry an adapted module, got none"),
    ):
        with pytest.raises(ValueError, match=why):
            check_update(bad, task, SPEC)


LEFT = {"ratio": 0.25, "rank": 2.0}
ARM = replace(PRUNING, knobs={"prune_ratio": 0.25})
GIVEN_UP = replace(GOOD, payload=Payload(), metrics=LEFT, cost=Cost(out_of_memory=True))


def test_a_task_that_ran_out_of_memory_is_heard() -> None:
    check_update(GIVEN_UP, ARM, PRUNABLE)
    check_update(replace(GIVEN_UP, metrics=LEFT | {"ratio": 0.0}), replace(TASK, ranks={"m": 1}), SPEC)


@pytest.mark.parametrize(
    ("task", "bad", "why"),
    [
        (PRUNING, GIVEN_UP, "leaves nothing to make smaller, got an update that ran out"),
        (TASK, GIVEN_UP, "leaves nothing to make smaller, got an update that ran out"),
        (ARM, replace(GIVEN_UP, payload=GOOD.payload), "ran out of memory must carry no tensors, got some"),
        (ARM, replace(GIVEN_UP, payload=Payload(keep=NARROW)), "ran out of memory must carry no tensors, got some"),
        (ARM, replace(GIVEN_UP, metrics=LEFT | {"ratio": 0.3}), "metric 'ratio' must be its task's 0.25, got 0.3"),
        (ARM, replace(GIVEN_UP, metrics=LEFT | {"rank": 1.0}), "metric 'rank' must be its task's 2, got 1.0"),
        (ARM, replace(GIVEN_UP, metrics={"rank": 2.0}), "metric 'ratio' must be its task's 0.25, got None"),
        (ARM, replace(GIVEN_UP, cost=Cost()), "each adapted module once"),
        (ARM, replace(GIVEN_UP, kind=Kind.EVALUATE), "kind must be"),
    ],
)
def test_a_bad_word_of_memory_is_refused(task: Task, bad: Update, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_update(bad, task, PRUNABLE)


def test_what_is_repeated_is_the_tasks_however_large() -> None:
    task = replace(TASK, knobs={"flops": 3.5e18, "need": 2**40 + 1, "bits": 4})
    said = {"flops": 3.5e18, "need": float(2**40 + 1), "bits": 4.0}
    check_update(replace(GOOD, metrics=said), task, SPEC)
    for name in said:
        for value in (said[name] * 2, said[name] - 1024, None):
            metrics = {key: number for key, number in said.items() if key != name}
            metrics |= {} if value is None else {name: value}
            with pytest.raises(ValueError, match=f"metric '{name}' must"):
                check_update(replace(GOOD, metrics=metrics), task, SPEC)
    with pytest.raises(ValueError, match="metric 'flops' must lie within"):
        check_update(replace(GOOD, metrics={"flops": 3.5e18}), TASK, SPEC)


SKETCH_TASK = replace(TASK, subspace=Subspace(family="sketch", k=8, seed=1), scalar_limit=2.0, seed=99)
POOL_TASK = replace(TASK, subspace=Subspace(family="rademacher", k=8, seed=1), seed=99)
LISTED = Scalars(over=Over.POOL, k=8, values=np.ones(3), indices=np.array([5, 0, 5]))
LISTED_TASK = replace(POOL_TASK, start=Payload(scalars=LISTED))


def steps(values: Any = (1.0, -0.5), **other: Any) -> Scalars:
    return Scalars(**({"over": Over.STEPS, "k": 8, "values": np.array(values), "seed": 99} | other))


def pool(indices: list[int], k: int = 8) -> Scalars:
    return Scalars(over=Over.POOL, k=k, values=np.ones(len(indices)), indices=np.array(indices))


def answered(scalars: Scalars | None, **other: Any) -> Update:
    return replace(GOOD, payload=Payload(scalars=scalars), **other)


def test_good_scalars_pass() -> None:
    check_update(answered(steps()), SKETCH_TASK, SPEC)
    check_update(answered(steps([2.0 * 1.005])), SKETCH_TASK, SPEC)  # int8 may round past the limit a little
    check_update(answered(Scalars(over=Over.BASIS, k=8, values=np.ones(8))), SKETCH_TASK, SPEC)
    check_update(answered(pool([3, 3, 7])), POOL_TASK, SPEC)
    check_update(answered(pool([5, 0])), LISTED_TASK, SPEC)


@pytest.mark.parametrize(
    ("task", "bad", "why"),
    [
        (SKETCH_TASK, answered(steps([np.nan])), "must carry finite scalars"),
        (SKETCH_TASK, answered(steps([2.1])), r"must carry scalars within \+-2, got 2.1"),
        (SKETCH_TASK, answered(steps(seed=98)), "directions of the task's seed 99, got 98"),
        (SKETCH_TASK, answered(steps(k=16)), "of 8, got steps of 16"),
        (SKETCH_TASK, answered(pool([1])), "over steps or basis of 8, got pool of 8"),
        (SKETCH_TASK, answered(Scalars(over=Over.BASIS, k=8, values=np.ones(7))), "must carry 8 coordinates, got 7"),
        (SKETCH_TASK, GOOD, "must carry scalars and nothing else"),
        (SKETCH_TASK, answered(None), "must carry scalars and nothing else"),
        (SKETCH_TASK, answered(steps(), round=2), "round must be its task's 3, got 2"),  # a replay of an earlier round
        (SKETCH_TASK, answered(steps(), nonce=6), "nonce must be its task's 7, got 6"),
        (POOL_TASK, answered(pool([8])), "must carry seed indices in 0..7, got 8"),
        (POOL_TASK, answered(pool([-1])), "must carry seed indices in 0..7"),
        (POOL_TASK, answered(steps()), "over pool of 8, got steps of 8"),
        (LISTED_TASK, answered(pool([0, 5])), "directions that the task lists, got others"),
        (LISTED_TASK, answered(pool([5, 0, 5, 1])), "directions that the task lists, got others"),
        (TASK, answered(steps()), "each adapted module once"),
    ],
)
def test_bad_scalars_are_refused(task: Task, bad: Update, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_update(bad, task, SPEC)


NO = Refusal(device="x", round=3, reason="the data is gone", run="r", nonce=7, version=2)


def test_a_refusal_is_of_its_task() -> None:
    check_refusal(NO, TASK)
    check_refusal(replace(NO, reason="", version=0), TASK)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (replace(NO, device="y"), "a refusal's device must be its task's 'x', got 'y'; it said: the data is gone"),
        (replace(NO, round=2), "a refusal's round must be its task's 3, got 2; it said: the data is gone"),
        (replace(NO, run="other"), "a refusal's run must be its task's 'r', got 'other'; it said: the data is gone"),
        (replace(NO, nonce=6, reason=""), "a refusal's nonce must be its task's 7, got 6; it said: no reason given"),
    ],
)
def test_an_old_or_borrowed_refusal_is_none(bad: Refusal, why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}$"):
        check_refusal(bad, TASK)
