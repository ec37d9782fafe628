"""Devices by name, seeded cohorts, and what each holds."""

from __future__ import annotations

import pytest

from fedloom.protocols.messages import DeviceReport, Hello, MatrixSpec, ModelSpec
from fedloom.server.roster import Roster

SPEC = ModelSpec(base_hash="a" * 64, matrices={"m": MatrixSpec(d_out=4, d_in=4)})


def hello(name: str, spec: ModelSpec = SPEC, version: int = 0) -> Hello:
    return Hello(report=DeviceReport(device=name, examples=3, rank=2, version=version), spec=spec)


def roster(count: int = 20) -> Roster:
    return Roster({100 - index: hello(f"device-{index:02d}") for index in range(count)})


def test_devices_are_known_by_name_whatever_their_node() -> None:
    assert [report.device for report in roster(3).reports()] == ["device-00", "device-01", "device-02"]
    assert roster(3).node("device-02") == 98


def test_cohorts_repeat_with_the_seed_and_change_with_the_round() -> None:
    draws = [[r.device for r in roster().draw(5, seed=1, round=round)] for round in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 5
    assert len(roster().draw(0, seed=1, round=1)) == len(roster().draw(99, seed=1, round=1)) == 20


def test_every_device_is_drawn_about_as_often() -> None:
    drawn = [r.device for round in range(400) for r in roster().draw(5, seed=0, round=round)]
    counts = [drawn.count(f"device-{index:02d}") for index in range(20)]
    assert min(counts) > 60
    assert max(counts) < 140  # 100 expected, standard deviation 8.7


def test_what_was_noted_comes_back() -> None:
    first, second = (Roster({1: hello("device-00", version=9), 2: hello("device-01", version=9)}) for _ in "12")
    first.saw("device-01", version=4, trained_in=4)
    first.saw("device-00", version=3)
    assert second.restore(first.to_json()) == []
    assert second.reports() == first.reports()
    with pytest.raises(ValueError, match="devices of its checkpoint"):
        roster(3).restore(first.to_json())


def test_a_device_that_lost_its_model_starts_from_the_base() -> None:
    """And keeps its place among the rounds; a device that is ahead goes back to what the checkpoint says."""
    fleet = Roster({1: hello("device-00", version=2), 2: hello("device-01", version=7)})
    assert fleet.restore({"device-00": [5, 4], "device-01": [5, 4]}) == ["device-00"]
    assert [(r.version, r.state_round) for r in fleet.reports()] == [(0, 4), (5, 4)]


def test_bad_fleets_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one device"):
        Roster({})
    with pytest.raises(ValueError, match="names must differ, got 'x' twice"):
        Roster({1: hello("x"), 2: hello("x")})
    other = ModelSpec(base_hash="b" * 64, matrices=SPEC.matrices)
    with pytest.raises(ValueError, match="same base and targets: 'x' holds aaaaaaaaaaaa, 'y' holds bbbbbbbbbbbb"):
        Roster({1: hello("x"), 2: hello("y", other)})
