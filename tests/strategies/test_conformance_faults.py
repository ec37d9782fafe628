"""Conformance: what no strategy takes in, and that it changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
from conformance_cases import CASES, ONE_IS_ALL, ONE_IS_ALL_SEEDS, UNEQUAL, begin, same, spec_for
from toy_fleet import K, answers

from fedloom.protocols.messages import Over, Scalars
from fedloom.strategies.base import Scaling
from fedloom.strategies.registry import build


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
    return replace(payload, factors=factors, dense=dense)


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
    if (case, fault) == ("fedpipe", "missing module"):
        pytest.skip("devices have the modules that their tasks name; the server holds them to those")
    strategy, devices, state, rng = begin(case, rounds=0 if case in UNEQUAL else 2)  # all have the whole model then
    before = {name: x.copy() for name, x in state.tensors.items()}
    good = answers(strategy, state, devices, spec_for(case), rng)
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
    good = answers(strategy, state, devices, spec_for(case), rng)
    payload = good[1].payload
    bad = replace(payload, scalars=spoil_scalars(payload.scalars, fault))
    if fault == "tensors beside":
        bad = replace(payload, dense={"head.weight": np.ones((3, 5))})
    with pytest.raises(ValueError, match=f"update of d1 ({SCALAR_FAULTS[fault]}|.*{SCALAR_FAULTS[fault]})"):
        strategy.aggregate(state, [good[0], replace(good[1], payload=bad), good[2]])
    same(strategy.aggregate(state, good), strategy.aggregate(state, good))
