"""The virtual clock against closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.simulations.clock import Clock, Load
from fedloom.simulations.devices import Profile

DEVICE = Profile(name="d", peak=1e9, memory=10**9, down=8e6, up=4e6)


def test_a_device_receives_computes_and_sends() -> None:
    assert Load(down_bytes=2e6, compute_seconds=3.0, up_bytes=1e6).seconds(DEVICE) == 2 + 3 + 2
    assert Load().seconds(DEVICE) == 0


def test_a_round_waits_for_its_slowest() -> None:
    clock = Clock()
    passed = clock.round({"a": 1.0, "b": 4.0, "c": 2.0})
    assert (passed.seconds, passed.idle, passed.idle_seconds) == (4.0, {"a": 3.0, "c": 2.0, "b": 0.0}, 5.0)
    after = clock.round({"a": 2.0})
    assert (after.began, after.ended, clock.now, clock.rounds, clock.idle_seconds) == (4.0, 6.0, 6.0, 2, 5.0)


def test_a_round_ends_with_the_first_k_and_ties_go_by_name() -> None:
    passed = Clock(now=10.0).round({"d": 9.0, "b": 2.0, "c": 1.0, "a": 2.0}, first=2)
    assert passed.waited_for == ("c", "a")
    assert (passed.seconds, passed.ended, passed.idle_seconds) == (2.0, 12.0, 1.0)
    assert passed.finished["d"] == 9.0


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e6), min_size=1, max_size=20), st.data())
def test_idle_is_n_max_less_the_sum(times: dict[str, float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(times)))
    passed = Clock().round(times, first=k)
    kept = sorted(times.values())[: k or len(times)]
    assert passed.seconds == kept[-1]
    assert passed.idle_seconds == pytest.approx(len(kept) * kept[-1] - sum(kept), abs=1e-6)


def test_bad_rounds() -> None:
    with pytest.raises(ValueError, match="at least one device"):
        Clock().round({})
    with pytest.raises(ValueError, match=r"must wait for 1\.\.1 devices, got 2"):
        Clock().round({"a": 1.0}, first=2)
    with pytest.raises(ValueError, match="time of a must be finite and >= 0, got nan"):
        Clock().round({"a": float("nan")})
    with pytest.raises(ValueError, match="up_bytes must be finite and >= 0, got -1"):
        Load(up_bytes=-1)
