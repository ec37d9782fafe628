"""Devices by name, seeded cohorts, and what each holds."""

from __future__ import annotations

import pytest

from fedloom.protocols.messages import DeviceReport, Hello, MatrixSpec, ModelSpec
from fedloom.server.roster import Roster, Standing

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


def test_a_device_of_the_checkpoint_is_taken_back_when_it_comes() -> None:
    fleet = Roster({1: hello("device-00", version=9)})
    fleet.restore({"device-00": [3, 0], "device-01": [4, 2, 1, 8]})
    assert fleet.away() == ["device-01"]
    assert fleet.to_json() == {"device-00": [3, 0, 0, 0], "device-01": [4, 2, 1, 8]}
    fleet.join(2, hello("device-01", version=9))
    assert fleet.away() == []
    assert [(r.version, r.state_round) for r in fleet.reports()] == [(3, 0), (4, 2)]
    assert fleet.standing("device-01").until == 8


def test_devices_come_and_go() -> None:
    fleet = roster(3)  # nodes 100, 99, 98
    assert fleet.present([100, 98, 7]) == [7]
    assert [report.device for report in fleet.reports()] == ["device-00", "device-02"]
    assert fleet.node("device-01") is None
    assert {r.device for r in fleet.draw(0, seed=0, round=1)} == {"device-00", "device-02"}
    fleet.join(7, hello("device-01", version=5))  # back under another node
    assert fleet.node("device-01") == 7
    with pytest.raises(ValueError, match="names must differ, got 'device-00' twice"):
        fleet.join(8, hello("device-00"))
    fleet.join(9, hello("aardvark"))
    assert fleet.reports()[0].device == "aardvark"


def test_a_device_that_keeps_failing_sits_out() -> None:
    fleet = roster(3)
    for round in (1, 2):
        fleet.did("device-00", good=False, round=round, patience=2, rest=3)
    assert fleet.standing("device-00").until == 5
    assert "device-00" not in [r.device for r in fleet.draw(0, seed=0, round=5)]
    assert "device-00" in [r.device for r in fleet.draw(0, seed=0, round=6)]
    fleet.did("device-01", good=False, round=1, patience=2, rest=3)
    fleet.did("device-01", good=True, round=2, patience=2, rest=3)
    fleet.did("device-01", good=False, round=3, patience=2, rest=3)
    assert fleet.standing("device-01") == Standing(failures=1)
    again = roster(3)
    again.restore(fleet.to_json())
    assert again.standing("device-00") == fleet.standing("device-00")
    for name in ("device-01", "device-02"):
        for round in (3, 4):
            fleet.did(name, good=False, round=round, patience=2, rest=9)
    assert len(fleet.draw(0, seed=0, round=5)) == 3  # all sit out: none does


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
    with pytest.raises(ValueError, match=r"base and targets, a{12} \(1 adapted matrices\), got b{12} \(1 adapted"):
        Roster({1: hello("x"), 2: hello("y", other)})
