import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_fleet import SPEC, close, dense_of, merge, noise_payload

from fedloom.protocols.messages import Payload
from fedloom.strategies.base import State
from fedloom.strategies.lowrank import add
from fedloom.strategies.packing import spec_to_meta
from fedloom.strategies.patchlog import WINDOW, PatchLog, read_log, size


def grow(rounds, ranks, dtype=np.float64):
    rng = np.random.default_rng(0)
    logs, deltas = [PatchLog(spec=SPEC)], []
    for t in range(rounds):
        deltas.append(noise_payload(rng, SPEC, ranks[t % len(ranks)], 2.0, dtype=dtype))
        logs.append(logs[-1].push(deltas[-1]))
    return logs, deltas


def sums(deltas):
    out = [dense_of(Payload())]
    for delta in deltas:
        out.append(merge(out[-1], delta))
    return out


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.lists(st.integers(0, 14), min_size=1, max_size=6, unique=True),
    st.sampled_from([np.float32, np.float64]),
)
def test_any_chain_of_catch_ups_ends_at_the_sum_of_all_deltas(ranks, stops, dtype):
    logs, deltas = grow(14, ranks, dtype)
    models, version, model, held = sums(deltas), 0, dense_of(Payload()), Payload()
    for stop in [*sorted(stops), 14]:
        patch = logs[stop].since(version)
        if patch is None:
            assert stop == version
            continue
        assert (patch.version, patch.base_hash) == (stop, "toy")
        assert patch.since in (0, version)
        if patch.since == 0:
            model, held = dense_of(Payload()), Payload()
        model, held, version = merge(model, patch.payload), add(patch.payload, held, SPEC), stop
        close(model, models[stop], 1e-6)
        close(dense_of(held), models[stop], 1e-6)


def test_the_window_hands_out_only_what_was_missed_and_the_newest_first():
    logs, deltas = grow(6, [1])
    patch = logs[-1].since(4)
    assert patch is not None
    assert patch.since == 4
    np.testing.assert_array_equal(patch.payload.factors["q"].a[0], deltas[5].factors["q"].a[0])
    np.testing.assert_array_equal(patch.payload.factors["q"].a[1], deltas[4].factors["q"].a[0])


def test_the_whole_patch_is_handed_out_where_that_is_smaller_or_the_window_ends():
    logs, deltas = grow(30, [6])
    assert len(logs[-1].recent) < WINDOW
    for version in range(30):
        patch = logs[-1].since(version)
        assert patch is not None
        assert size(patch.payload) <= size(logs[-1].total)
        np.testing.assert_array_equal(patch.payload.factors["q"].a[:6], deltas[-1].factors["q"].a)
    assert logs[-1].since(2).since == 0
    assert logs[-1].since(29).since == 29


def test_memory_does_not_grow_with_rounds():
    logs, _ = grow(60, [5])
    numbers = [size(log.older) + sum(size(x) for x in log.recent) for log in logs]
    assert max(numbers[20:]) <= max(numbers[:20])
    assert len(grow(60, [1])[0][-1].recent) <= WINDOW


def test_a_device_ahead_of_the_log_gets_the_whole_patch():
    logs, deltas = grow(3, [2])
    patch = logs[-1].since(7)
    assert patch is not None
    assert (patch.since, patch.version) == (0, 3)
    close(dense_of(patch.payload), sums(deltas)[-1], 1e-12)
    with pytest.raises(ValueError, match="must be >= 0"):
        logs[-1].since(-1)


def test_an_up_to_date_device_is_told_so():
    log = grow(3, [2])[0][-1]
    patch = log.since(3)
    assert patch is not None
    assert (patch.since, patch.version, bool(patch.payload)) == (3, 3, False)


def test_empty_rounds_need_no_patch():
    log = PatchLog(spec=SPEC).push(Payload()).push(Payload())
    assert log.since(0) is None
    assert log.since(1) is None


def test_a_log_survives_its_state():
    log = grow(5, [3])[0][-1]
    meta = {"spec": spec_to_meta(SPEC), "log": log.meta()}
    again = read_log(State(version=5, tensors=log.tensors(), meta=meta))
    assert again.spec == SPEC
    for version in range(6):
        x, y = log.since(version), again.since(version)
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert x.since == y.since
            close(dense_of(x.payload), dense_of(y.payload), 1e-15)
