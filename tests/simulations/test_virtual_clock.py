"""The virtual clock against closed forms; what a task takes a device on it, in test_unequal.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.protocols.messages import Cost, Update
from fedloom.server import loop
from fedloom.simulations.clock import Load, elapsed
from fedloom.simulations.devices import Profile

DEVICE = Profile(name="d", peak=1e9, memory=10**9, down=8e6, up=4e6)


def test_a_device_receives_computes_and_sends() -> None:
    assert Load(down_bytes=2e6, compute_seconds=3.0, up_bytes=1e6).seconds(DEVICE) == 2 + 3 + 2
    assert Load().seconds(DEVICE) == 0


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), max_size=4))
def test_rounds_follow_each_other_and_each_waits_for_its_slowest(rounds: list[list[float]]) -> None:
    records: list[dict[str, float]] = [{"round": 0}]
    for number, times in enumerate(rounds, 1):
        records.append({"round": number})
        loop._add_up(
            records[-1], [Update(device="d", round=number, examples=1, cost=Cost(seconds=time)) for time in times]
        )
    took = elapsed(records)
    assert took["virtual_seconds"] == pytest.approx(sum(max(times) for times in rounds))
    idle = sum(max(times) - time for times in rounds for time in times)
    assert took["idle_seconds"] == pytest.approx(idle, abs=1e-6)


def test_bad_loads() -> None:
    for field in ("down_bytes", "compute_seconds", "up_bytes"):
        with pytest.raises(ValueError, match=f"{field} must be finite and >= 0, got -1"):
            Load(**{field: -1})
    with pytest.raises(ValueError, match="must be finite and >= 0, got inf"):
        Load(up_bytes=float("inf"))
