"""The short core of the tests of real processes, for every `make test`: keys, TLS, a kill, a simulation's bytes.

The longer ones are marked `deploy`. Waits here are far longer than a quiet machine needs: only a hang is a failure.
"""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

from stand import PRETEND, Stand, run

ROUNDS = 3
PATIENT = 600.0  # seconds


def test_a_killed_run_with_real_devices_ends_in_the_bytes_of_a_simulation(tmp_path: Path) -> None:
    """A device whose key is revoked is kept out, two others train, the server dies with the tasks of round 2 out."""
    changes = {"server": {"rounds": ROUNDS, "timeout": PATIENT}}
    began = time.monotonic()
    with Stand(tmp_path / "deployed", devices=2, known=PRETEND, changes=changes) as stand:
        stand.add_device(2, "shut-out")
        run("keys", "revoke", "shut-out", "--keys", stand.folder / "keys")
        stand.start_server()
        stand.start_client("shut-out")
        stand.start_client(PRETEND[0])  # no round begins without the other one
        refused = "refuses this device's key"
        stand.wait(lambda: refused in stand.log("shut-out"), seconds=PATIENT, label="the revoked key to be refused")
        assert stand.processes["shut-out"].poll() is None  # it goes on trying, in case it is let in
        stand.processes["shut-out"].send_signal(signal.SIGTERM)
        print(f"refused after {time.monotonic() - began:.1f} s")
        stand.start_client(PRETEND[1])
        stand.wait(lambda: stand.is_out(2), seconds=PATIENT, pause=0.01, label="the tasks of round 2")
        assert stand.kill("server") == 1
        print(f"killed after {time.monotonic() - began:.1f} s")
        stand.wait_to_finish(PATIENT)
        print(f"finished after {time.monotonic() - began:.1f} s")
        told = stand.log("server", 200)
        assert "(shut-out): its key is revoked" in told
        assert re.search(rf"goes on after round [12] with 2 devices: {', '.join(PRETEND[:2])}", told)
        assert "Traceback" not in told
        assert {event["device"] for event in stand.events() if event["event"] == "joined"} == set(PRETEND[:2])
        assert [record["round"] for record in stand.records()] == list(range(ROUNDS + 1))
        assert stand.final_state() == stand.simulated(tmp_path / "simulated")
    print(f"done after {time.monotonic() - began:.1f} s")
