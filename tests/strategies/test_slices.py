"""A device's slice of the model: cutting it out, putting it back, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
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
    keeps,
)
from toy_fleet import noise_payload, reports, update_of

from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import Axis, MatrixSpec, ModelSpec, Patch, Payload, Scalars, Start, Task
from fedloom.strategies import masked
from fedloom.strategies.base import Scaling
from fedloom.strategies.intake import check_update
from fedloom.strategies.masked import (
    MaskedAccumulator,
    pruned,
    scatter_payload,
    slice_patch,
    slice_payload,
    slice_term,
)
from fedloom.strategies.packing import spec_from_meta, spec_to_meta
from fedloom.strategies.patchlog import size
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
    with pytest.raises(ValueError, match="must be of the whole model"):
        slice_patch(patch_of(mine), SPEC, HALF)
    with pytest.raises(ValueError, match=r"must name what the model has, got \['x'\]"):
        slice_patch(patch_of(Payload(dense={"x": np.ones(2)})), SPEC, HALF)
    with pytest.raises(ValueError, match="must have 4 units, got 3"):
        slice_patch(patch_of(whole), SPEC, {"heads": np.arange(3) > 0})


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


def patch_of(payload: Payload) -> Patch:
    return Patch(base_hash="toy", since=2, version=3, payload=payload)


@settings(max_examples=30, deadline=None)
@given(keep=keeps)
def test_a_patch_for_a_pruned_device_is_its_slice(keep: Any):
    whole = noise_payload(np.random.default_rng(0), SPEC, 2, 2.0)
    patch = patch_of(replace(whole, dense={**whole.dense, "plain": np.ones((18, 18)), "o": np.ones((18, 20))}))
    mine, wanted = slice_patch(patch, SPEC, keep), slice_payload(patch.payload, SPEC, keep)
    assert mine is not None
    if all(bits.all() for bits in keep.values()):
        assert mine is patch
        return
    assert (mine.base_hash, mine.since, mine.version) == ("toy", 2, 3)
    assert mine.payload
    for kind in ("factors", "dense", "keep"):
        got, expected = getattr(mine.payload, kind), getattr(wanted, kind)
        assert list(got) == list(expected)
        assert len(got) == len(expected)
        assert "x" not in got
        for name in expected:
            one, other = got[name], expected[name]
            for x, y in ((one.b, other.b), (one.a, other.a)) if kind == "factors" else ((one, other),):
                np.testing.assert_array_equal(x, y)
    task = Task(device="d", round=1, rank=2, alpha=4.0, start_from=Start.PATCH, patch=mine)
    arrived = decode(encode(task), Task, limit=1 << 20)
    assert arrived.patch is not None
    assert arrived.patch.payload.factors["qkv"].b.shape == (pruned(SPEC, keep).matrices["qkv"].d_out, 2)
    assert size(arrived.patch.payload) == size(mine.payload) < size(patch.payload)


def test_a_device_that_misses_nothing_is_told_no_more():
    empty = patch_of(Payload())
    assert slice_patch(empty, SPEC, HALF) is empty
    assert slice_patch(None, SPEC, HALF) is None


def test_slices_for_many_devices_take_no_memory():
    matrix = MatrixSpec(d_out=4000, d_in=40, rows=Axis(group="heads", width=1000))
    spec = ModelSpec(base_hash="wide", matrices={"w": matrix}, groups={"heads": 4})
    patch = patch_of(noise_payload(np.random.default_rng(0), spec, 8, 8.0))
    tracemalloc.start()
    try:
        mine = [slice_patch(patch, spec, {"heads": np.arange(4) != i % 4}) for i in range(64)]
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < 8 * size(patch.payload)  # bytes: less than one float64 copy
    assert all(one is not None and one.payload.factors["w"].b.shape == (3000, 8) for one in mine)


@settings(max_examples=60, deadline=None)
@given(one=keeps, other=keeps)
def test_which_units_are_known(one: Any, other: Any):
    """By the definition, unit by unit: a group that is not named is whole."""

    def units(keep: Any) -> set[tuple[str, int]]:
        return {(g, u) for g, n in SPEC.groups.items() for u in range(n) if keep.get(g, np.ones(n, bool))[u]}

    common = masked.in_both(one, other)
    assert units(common) == units(one) & units(other)
    assert all(not bits.all() for bits in common.values())
    assert masked.covers(one, other) == (units(one) >= units(other))
    assert masked.covers(one, common)


def test_a_state_remembers_the_groups():
    for spec in (SPEC, BOTH, replace(SPEC, groups={"heads": 4}, matrices={})):
        assert spec_from_meta(json.loads(json.dumps(spec_to_meta(spec)))) == spec
    plain = ModelSpec(base_hash="h", matrices={"w": MatrixSpec(d_out=2, d_in=3)})
    assert spec_to_meta(plain).keys() == {"base_hash", "matrices", "dense", "mask"}
