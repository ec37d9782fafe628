"""A device's slice of the model: cutting it out, putting it back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_fleet import (
    BOTH,
    HALF,
    HEADS,
    SPEC,
    answers,
    bits,
    covered,
    dense_of_whole,
    keeps,
)
from toy_fleet import close, noise_payload, reports, update_of

from fedloom.protocols.messages import MatrixSpec, ModelSpec, Patch, Payload, Scalars, Start, Task
from fedloom.strategies import masked
from fedloom.strategies.base import Scaling
from fedloom.strategies.intake import check_update
from fedloom.strategies.lowrank import add
from fedloom.strategies.masked import MaskedAccumulator, pruned, scatter_payload, slice_payload, slice_term
from fedloom.strategies.packing import spec_from_meta, spec_to_meta
from fedloom.strategies.registry import build


@settings(max_examples=60, deadline=None)
@given(keep=keeps, rank=st.integers(1, 5))
def test_a_slice_scattered_and_sliced_is_itself(keep: Any, rank: int):
    whole = noise_payload(np.random.default_rng(0), SPEC, rank, 3.0)
    whole = replace(whole, dense={**whole.dense, "plain": np.ones((18, 18)), "o": np.arange(360.0).reshape(18, 20)})
    mine = slice_payload(whole, SPEC, keep)
    back = scatter_payload(mine, SPEC)
    again = slice_payload(back, SPEC, keep)
    assert set(again.keep) == set(keep)
    for name, matrix in SPEC.matrices.items():
        r = covered(matrix.rows, keep, matrix.d_out)[:, None]
        c = covered(matrix.columns, keep, matrix.d_in)[None, :]
        np.testing.assert_array_equal(back.factors[name].b, whole.factors[name].b * r)
        np.testing.assert_array_equal(back.factors[name].a, whole.factors[name].a * c)
        np.testing.assert_array_equal(again.factors[name].b, mine.factors[name].b)
        np.testing.assert_array_equal(again.factors[name].a, mine.factors[name].a)
        small = pruned(SPEC, keep).matrices[name]
        assert (mine.factors[name].b.shape[0], mine.factors[name].a.shape[1]) == (small.d_out, small.d_in)
    for name, value in mine.dense.items():
        np.testing.assert_array_equal(again.dense[name], value)
    small_o = pruned(SPEC, keep).matrices["o"]
    assert mine.dense["o"].shape == (small_o.d_out, small_o.d_in)


@settings(max_examples=30, deadline=None)
@given(first=bits(HEADS), data=st.data())
def test_units_of_a_pruned_spec_are_where_its_axes_say(first: Any, data: Any):
    second = data.draw(bits(int(first.sum())))
    both = first.copy()
    both[first] = second
    whole = noise_payload(np.random.default_rng(0), SPEC, 2, 2.0)
    once, small = slice_payload(whole, SPEC, {"heads": first}), pruned(SPEC, {"heads": first})
    twice = slice_payload(replace(once, keep={}), small, {"heads": second})
    direct = slice_payload(whole, SPEC, {"heads": both})
    for name in SPEC.matrices:
        np.testing.assert_array_equal(twice.factors[name].b, direct.factors[name].b)
        np.testing.assert_array_equal(twice.factors[name].a, direct.factors[name].a)


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "fedit", "ffa"])
def test_other_strategies_refuse_a_pruned_update(name: str):
    strategy = build(name, {"rank": 2}, Scaling())
    state = strategy.init(SPEC, 0, reports([2]))
    (update,) = answers([(2, 1, 4.0, {"heads": np.array([True, True, False, False])})])
    with pytest.raises(ValueError, match=r"update of d0 must be of the whole model, got one pruned in \['heads'\]"):
        strategy.aggregate(state, [update])


def test_a_keep_is_no_answer_where_none_is_asked_for():
    bare = update_of(Payload(keep={"heads": np.ones(HEADS, bool)}))
    local = build("local", {}, Scaling())
    with pytest.raises(ValueError, match="must carry no tensors under local"):
        local.aggregate(local.init(SPEC, 0), [bare])
    seeds = build("fedkseed", {"k": 8}, Scaling())
    scalars = Scalars(over="pool", k=8, values=np.ones(1), indices=np.zeros(1, np.int64))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must carry scalars and nothing else"):
        seeds.aggregate(seeds.init(SPEC, 0), [replace(bare, payload=replace(bare.payload, scalars=scalars))])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: replace(p, keep={"legs": np.ones(2, bool)}), "keep of update of d0 must name groups of the model"),
        (lambda p: replace(p, keep={"heads": np.ones(5, bool)}), "must have 4 units, got 5"),
        (lambda p: replace(p, keep={"heads": np.zeros(4, bool)}), "must keep at least one unit, got none"),
        (lambda p: replace(p, keep={"heads": np.ones(4)}), "must be a vector of bool, got float64"),
        (lambda p: replace(p, keep={}), r"must have b \[29, r\] and a \[r, 18\] for qkv, got \(17, 2\)"),
        (lambda p: replace(p, keep={"heads": np.array([True, True, True, False])}), r"must have b \[23, r\]"),
        (lambda p: replace(p, keep={"channels": np.arange(7) < 1}), r"must have b \[29, r\]"),
        (lambda p: scatter_payload(p, SPEC).factors | {}, None),
    ],
)
def test_shapes_must_be_those_of_the_keep(change: Any, match: str | None):
    (update,) = answers([(2, 1, 4.0, HALF)])
    check_update(update, SPEC, masked=True)
    payload = change(update.payload)
    if match is None:  # full-size factors under a keep
        payload, match = replace(update.payload, factors=payload), r"must have b \[17, r\] and a \[r, 18\] for qkv"
    with pytest.raises(ValueError, match=match):
        check_update(replace(update, payload=payload), SPEC, masked=True)


def test_what_cannot_be_sliced_or_scattered_is_refused():
    whole = noise_payload(np.random.default_rng(0), SPEC, 2, 2.0)
    mine = slice_payload(whole, SPEC, HALF)
    with pytest.raises(ValueError, match="must be of the whole model"):
        slice_payload(mine, SPEC, HALF)
    with pytest.raises(ValueError, match=r"must name what the model has, got \['x'\]"):
        slice_payload(Payload(factors={"x": whole.factors["o"]}), SPEC, HALF)
    with pytest.raises(ValueError, match="a term to slice must have b"):
        slice_term(mine.factors["qkv"], SPEC.matrices["qkv"], HALF)
    with pytest.raises(ValueError, match="a pruned term must have b"):
        MaskedAccumulator(SPEC.matrices["qkv"]).add(whole.factors["qkv"], 1.0, HALF)
    with pytest.raises(ValueError, match="must keep the same units"):
        masked.add_slices(mine, slice_payload(whole, SPEC, {"heads": np.arange(4) < 2}), SPEC)


@pytest.mark.parametrize(
    ("keep", "allowed", "match"),
    [
        ({"heads": [1, 0, 0, 0]}, {"heads": [1, 1, 0, 0]}, None),
        ({}, {"heads": [1, 1, 1, 1]}, None),
        ({}, {}, None),
        ({"heads": [1, 1, 1, 1]}, {}, "must keep 'heads' whole, got a keep-bitmap of it"),
        ({"heads": [1, 0, 1, 0]}, {"heads": [1, 1, 0, 0]}, "no unit of 'heads' that was dropped, got unit 2"),
        ({}, {"heads": [1, 1, 0, 0]}, "no unit of 'heads' that was dropped, got unit 2"),
    ],
)
def test_nothing_dropped_comes_back(keep: Any, allowed: Any, match: str | None):
    sides = [{group: np.array(value, bool) for group, value in each.items()} for each in (keep, allowed)]
    if match is None:
        masked.check_within("an update", *sides)
    else:
        with pytest.raises(ValueError, match=match):
            masked.check_within("an update", *sides)


@settings(max_examples=20, deadline=None)
@given(keep=keeps, ranks=st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_slices_add_up_as_whole_patches_do(keep: Any, ranks: Any):
    newer, older = (noise_payload(np.random.default_rng(r), SPEC, r, 2.0) for r in ranks)
    whole = slice_payload(add(newer, older, SPEC), SPEC, keep)
    mine = masked.add_slices(slice_payload(newer, SPEC, keep), slice_payload(older, SPEC, keep), SPEC)
    close(dense_of_whole(mine), dense_of_whole(whole), 1e-12)
    assert set(mine.keep) == set(keep)


def test_a_task_for_a_pruned_device_has_slices():
    whole = noise_payload(np.random.default_rng(0), SPEC, 2, 2.0)
    patch = Patch(base_hash="toy", since=0, version=3, payload=whole)
    task = Task(device="d", round=1, rank=2, alpha=4.0, start_from=Start.PATCH, patch=patch)
    mine = masked.slice_task(task, SPEC, HALF)
    assert mine.patch is not None
    assert (mine.patch.since, mine.patch.version) == (0, 3)
    for keep in (mine.start.keep, mine.patch.payload.keep):
        np.testing.assert_array_equal(keep["heads"], HALF["heads"])
    assert mine.patch.payload.factors["qkv"].b.shape == (17, 2)
    empty = replace(task, patch=replace(patch, since=3, payload=Payload()))
    sliced = masked.slice_task(empty, SPEC, HALF).patch
    assert sliced == empty.patch
    assert masked.slice_task(task, SPEC, {}) == task


def test_a_state_remembers_the_groups():
    for spec in (SPEC, BOTH, replace(SPEC, groups={"heads": 4}, matrices={})):
        assert spec_from_meta(json.loads(json.dumps(spec_to_meta(spec)))) == spec
    plain = ModelSpec(base_hash="h", matrices={"w": MatrixSpec(d_out=2, d_in=3)})
    assert spec_to_meta(plain).keys() == {"base_hash", "matrices", "dense", "mask"}
