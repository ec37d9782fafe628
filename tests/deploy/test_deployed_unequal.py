"""Strategies that treat devices unlike, on real processes: the same bytes as a simulation, through a killed server.

What they learn from seconds is left out: real ones are never the same twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from stand import PRETEND, Stand

pytestmark = pytest.mark.deploy

ROUNDS = 4
PATIENCE = 600.0  # seconds
SPINE = {"ramp": 3, "reward_time": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {"fedspine": ("units", SPINE), "fedpipe": ("shapes", {"pace": 0.0})}


@pytest.mark.parametrize("strategy", CASES)
def test_a_killed_run_of_unequal_devices_ends_in_the_bytes_of_a_simulation(strategy: str, tmp_path: Path) -> None:
    describe, options = CASES[strategy]
    changes = {
        "model": {"describe": describe},
        "strategy": options,
        "server": {"rounds": ROUNDS, "timeout": PATIENCE},
        "eval": {"every": 2},
    }
    with Stand(tmp_path / "deployed", devices=2, strategy=strategy, known=PRETEND, changes=changes) as stand:
        stand.start()
        stand.wait(lambda: stand.is_out(3), seconds=PATIENCE, pause=0.01, label="the tasks of round 3")
        assert stand.kill("server") == 1
        stand.wait_to_finish(PATIENCE)
        records = stand.records()
        assert [record["round"] for record in records] == list(range(ROUNDS + 1))
        assert all(record["assigned"].keys() == set(PRETEND[:2]) for record in records[1:])
        assert stand.final_state() == stand.simulated(tmp_path / "simulated")
        assert "Traceback" not in stand.log("server", 200)
        if strategy == "fedspine":
            assert all(line["ratio"] == 0.3 for line in records[-1]["assigned"].values())
