"""Wall clocks jump by two hours, ahead or back, while a round runs: the run goes on, nothing is lost or negative.

`clock.c` is preloaded into every process of the server or of a device, and shifts CLOCK_REALTIME alone, by what a file
says at the moment. Run with `-s` to see the seconds: `make test-deploy` does.
"""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from common import free_port
from stand import NAMES, Stand, answers

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(COMPILER is None, reason="the clock's shim needs a C compiler, and there is none"),
]

DEVICES = NAMES[:3]
ROUNDS, JUMP_ROUND = 4, 2
WRONG_SECONDS = 30.0  # how long a clock stays wrong
HOURS = 7200


@dataclass
class ClockStand(Stand):
    """A stand with a clock for the server and for each device, and the server's page."""

    shim: Path = Path()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.page = f"http://127.0.0.1:{free_port()}"
        with (self.folder / "server.toml").open("a") as file:
            file.write(f"[dashboard]\nenabled = true\nport = {self.page.rpartition(':')[2]}\n")
        for label in ("server", *self.names):
            self.clock(label).write_bytes(struct.pack("=q", 0))

    def clock(self, label: str) -> Path:
        return self.folder / f"{label}.clock"

    def around(self, label: str) -> tuple[list[str], dict[str, str]]:
        return [], {"LD_PRELOAD": str(self.shim), "FEDLOOM_TEST_CLOCK": str(self.clock(label))}

    def set_clocks(self, labels: tuple[str, ...], ahead: int) -> None:
        """Let clocks be so many seconds ahead of this machine's."""
        for label in labels:
            with self.clock(label).open("r+b") as file:
                file.write(struct.pack("=q", ahead))

    def look(self) -> None:
        """Read the page, the metrics and the health, as long as they are served: nothing is negative, or stale."""
        try:
            page, metrics, health = (httpx.get(self.page + path, timeout=10) for path in ("/", "/metrics", "/healthz"))
        except httpx.TransportError:
            return  # the run is over
        assert health.json()["status"] in ("waiting", "running", "finished"), health.text
        assert health.json()["seconds_since_event"] < 600
        assert not re.search(r"[-\u2212]\d[\d.]* (s|min|h)\b", page.text)
        samples = [line.rpartition(" ") for line in metrics.text.splitlines() if line and not line.startswith("#")]
        assert samples
        assert [(name, value) for name, _, value in samples if float(value) < 0 and name != "fedloom_run_round"] == []


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


def stand_of(folder: Path, shim: Path, **rules: Any) -> ClockStand:
    rules = {"rounds": ROUNDS, "min_updates": 3, "timeout": 240.0} | rules
    return ClockStand(folder, devices=len(DEVICES), changes={"server": rules}, shim=shim)


@pytest.fixture(scope="module")
def undisturbed(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with stand_of(tmp_path_factory.mktemp("undisturbed"), shim) as stand:
        stand.start()
        stand.wait_to_finish(600)
        return stand.final_state()


def in_round(stand: Stand, round: int) -> Callable[[], bool]:
    """Whether a round's tasks are out."""
    return lambda: any(e["event"] == "phase" and (e["round"], e["phase"]) == (round, "train") for e in stand.events())


def check_durations(stand: Stand) -> None:
    """No round is missing or there twice, and none took less than no time, nor hours."""
    records = stand.records()
    assert [record["round"] for record in records] == list(range(len(records)))
    for record in records:
        assert 0 <= record["train_seconds"] <= record["seconds"] < HOURS / 2
    assert all(0 <= event["seconds"] < HOURS / 2 for event in stand.events() if event["event"] == "answer")
    for record in records[1:]:
        assert record["updates"] == len({e["device"] for e in answers(stand.events(), record["round"], "train")})


def stay(stand: ClockStand, seconds: float) -> None:
    """Let time pass, and look on."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stand.look()
        time.sleep(1.0)


@pytest.mark.parametrize("ahead", [HOURS, -HOURS], ids=["ahead", "back"])
def test_a_device_whose_clock_jumps_is_told_so_and_comes_back(ahead: int, shim: Path, tmp_path: Path) -> None:
    with stand_of(tmp_path, shim, rounds=200, min_updates=2, timeout=20.0) as stand:
        stand.start()
        wrong = DEVICES[-1]
        stand.wait(in_round(stand, JUMP_ROUND), label=f"round {JUMP_ROUND}")
        stand.set_clocks((wrong,), ahead)
        stay(stand, WRONG_SECONDS)
        before = len(stand.records())
        said = f"{'ahead of' if ahead > 0 else 'behind'} the server's"
        stand.wait(lambda: said in stand.log(wrong), seconds=60, label=f"{wrong} to know that its clock is wrong")
        told = "ahead" if ahead > 0 else "behind"
        assert re.search(rf"{wrong}.*its clock is \d+ s {told}", stand.log("server", 200))
        stand.set_clocks((wrong,), 0)
        mended = time.time()

        def taken() -> list[float]:
            good = (e for e in stand.events() if e["event"] == "answer" and e["device"] == wrong and not e["refused"])
            return [event["time"] - mended for event in good if event["time"] > mended]

        back = stand.wait(taken, seconds=240, label=f"{wrong} to be back")[0]
        stand.look()
        check_durations(stand)
        assert before > JUMP_ROUND  # rounds went on
        assert min(record["updates"] for record in stand.records()[1:]) >= 2
        lines = [line for line in stand.log(wrong, 1000).splitlines() if said in line]
        print(f"\n{wrong}'s clock {ahead:+d} s: back {back:.1f} s after it was right; it said {lines}")
        assert len(lines) == 1


@pytest.mark.parametrize("ahead", [HOURS, -HOURS], ids=["ahead", "back"])
@pytest.mark.parametrize("who", ["server", "all"])
def test_a_server_whose_clock_jumps_goes_on_to_the_same_bytes(
    who: str, ahead: int, shim: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    """The server's alone is right again after a while; where all clocks jump together, as on one machine, they stay."""
    labels = ("server",) if who == "server" else ("server", *DEVICES)
    with stand_of(tmp_path, shim) as stand:
        stand.start()
        stand.wait(in_round(stand, JUMP_ROUND), label=f"round {JUMP_ROUND}")
        stand.set_clocks(labels, ahead)
        began = time.monotonic()
        stay(stand, WRONG_SECONDS)
        if who == "server":
            stand.set_clocks(labels, 0)
        checkpoint = stand.out / "checkpoints" / f"round-{JUMP_ROUND:06d}"
        stand.wait(checkpoint.exists, seconds=300, label=f"round {JUMP_ROUND}")
        seconds = time.monotonic() - began
        while stand.processes["server"].poll() is None:
            stay(stand, 1.0)
            assert time.monotonic() - began < 600, stand.log("server")
        stand.wait_to_finish(10)
        said = stand.log("server", 1000)
        check_durations(stand)
        if who == "server":  # which found all devices' clocks wrong
            assert (
                len(set(re.findall(rf"\((\S+)\): its clock is \d+ s {'behind' if ahead > 0 else 'ahead'}", said))) == 3
            )
        else:
            times = [event["time"] for event in stand.events()]
            jumps = (later - sooner for sooner, later in itertools.pairwise(times))
            assert any(jump == pytest.approx(ahead, abs=300) for jump in jumps)
        print(
            f"\nclocks of {who} {ahead:+d} s: round {JUMP_ROUND} was done {seconds:.1f} s after; "
            f"{stand.records()[-1]['refused']} answers refused"
        )
        assert stand.final_state() == undisturbed
