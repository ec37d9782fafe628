"""The owner's rules: each refuses what it must, lets pass what it may, and is asked before any work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stages import make_task

from fedloom.client.agent import machine
from fedloom.client.agent.accept import check_base, check_task
from fedloom.client.agent.hours import parse_hours, within
from fedloom.client.agent.rules import Gate, Probes
from fedloom.client.agent.traffic import Traffic
from fedloom.client.settings import Accept, Rules
from fedloom.protocols.messages import Kind, Patch, Payload


def at(clock: str) -> datetime:
    return datetime.fromisoformat(f"2026-02-03T{clock}")


def gate(folder: Path, probes: Probes | None = None, **rules: Any) -> Gate:
    return Gate(Rules(**rules), folder, Traffic(folder / "traffic.json"), probes)


@pytest.mark.parametrize(
    ("hours", "clock", "open_"),
    [
        ((), "12:00", True),
        (("22:00-06:00",), "21:59", False),
        (("22:00-06:00",), "22:00", True),
        (("22:00-06:00",), "00:00", True),
        (("22:00-06:00",), "05:59", True),
        (("22:00-06:00",), "06:00", False),
        (("09:00-12:00", "13:30-24:00"), "12:30", False),
        (("09:00-12:00", "13:30-24:00"), "23:59", True),
    ],
)
def test_hours(tmp_path: Path, hours: tuple[str, ...], clock: str, open_: bool) -> None:
    reason = gate(tmp_path, Probes(now=lambda: at(clock)), hours=hours).before(0)
    assert (reason == "") is open_
    assert open_ or reason == f"not now: this device works at {', '.join(hours)} (local time) only"


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_a_span_and_its_complement_share_no_minute(start: int, end: int, minute: int) -> None:
    def clock(minutes: int) -> str:
        return f"{minutes // 60:02}:{minutes % 60:02}"

    if start == end:
        return
    spans = [parse_hours([f"{clock(one)}-{clock(other)}"]) for one, other in ((start, end), (end, start))]
    now = datetime(2026, 2, 3, minute // 60, minute % 60)
    assert within(spans[0], now) is not within(spans[1], now)


@pytest.mark.parametrize(
    "text", ["", "22-6", "22:00", "25:00-06:00", "10:00-10:00", "22:60-23:00", "1:00-02:00", "00:00-24:30"]
)
def test_hours_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"^rules\.hours must be spans such as '22:00-06:00', got "):
        parse_hours([text])


def test_mains_power(tmp_path: Path) -> None:
    for plugged in (True, False):
        rule = gate(tmp_path, Probes(plugged_in=lambda plugged=plugged: plugged), plugged_in=True)
        assert (rule.during() == "") is plugged
        assert gate(tmp_path, Probes(plugged_in=lambda plugged=plugged: plugged)).during() == ""
    assert machine.plugged_in() in (True, False)


def test_the_load_of_others_is_measured_without_ones_own(tmp_path: Path) -> None:
    """A process that spins is somebody else's load, until it is named as one's own."""
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        others = machine.load_of_others([], seconds=0.6)
        mine = machine.load_of_others([spinner.pid], seconds=0.6)
        assert 0 < others <= 1
        assert 0 <= mine <= 1
        assert mine < others or others > 0.9  # a machine that is full has no room to tell
    finally:
        spinner.kill()
        spinner.wait()
    busy = Probes(load_of_others=lambda own: 0.5 if list(own) == [7] else 1.0)
    assert gate(tmp_path, busy, idle_cpu=0.6).before(0, own=(7,)) == ""
    reason = gate(tmp_path, busy, idle_cpu=0.3).before(0, own=(7,))
    assert reason == "not now: others use 50% of this device's processors, more than 30%"
    assert gate(tmp_path, busy, idle_cpu=0.3).during() == ""  # looked at before a task alone


def test_disk(tmp_path: Path) -> None:
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "v1").write_bytes(bytes(1_500_000))
    assert machine.bytes_under(tmp_path) == 1_500_000
    assert gate(tmp_path, max_disk_mb=2).before(400_000) == ""
    assert gate(tmp_path, max_disk_mb=2).before(600_000) == "this device may keep 2 MB on its disk, it holds 1.5 MB"
    assert "not now: this device's disk is full" in gate(tmp_path).before(10**18)


def test_traffic_of_a_day_is_counted_over_restarts(tmp_path: Path) -> None:
    today = date(2026, 2, 3)
    path = tmp_path / "traffic.json"
    Traffic(path, lambda: today).add(up=700_000, down=200_000)
    traffic = Traffic(path, lambda: today)
    assert traffic.now() == {"day": "2026-02-03", "up": 700_000, "down": 200_000}
    rule = Gate(Rules(max_traffic_mb=1), tmp_path, traffic)
    assert rule.before(0) == ""
    assert rule.sending(100_000) == ""
    assert rule.sending(100_001) == "not now: this device's traffic of a day must be <= 1 MB, today's is 0.9 MB"
    traffic.add(up=100_001)
    assert rule.before(0) != ""
    today = date(2026, 2, 4)
    assert rule.before(0) == ""
    assert traffic.total() == 0
    path.write_text("torn")
    assert Traffic(path, lambda: today).total() == 0


def accepted(check: Callable[[], None]) -> bool:
    try:
        check()
    except ValueError:
        return False
    return True


def test_only_what_is_on_the_list_is_accepted() -> None:
    accept = Accept(strategies=("fedloom", "fedit"), tuners=("lora",), bases=("0123abcd",))
    base = "0123abcd" + "e" * 56
    patch = Patch(base_hash=base, since=0, version=0, payload=Payload())
    assert accepted(lambda: check_task(make_task(patch=patch), accept))
    assert accepted(lambda: check_task(make_task(strategy="fedit"), accept))
    assert accepted(lambda: check_task(make_task(tuner="other", kind=Kind.EVALUATE), accept))  # nothing is tuned
    with pytest.raises(ValueError, match="this device accepts the strategies fedloom, fedit, got ''"):
        check_task(make_task(strategy=""), accept)
    with pytest.raises(ValueError, match="this device accepts the tuners lora, got 'zeroth_order'"):
        check_task(make_task(tuner="zeroth_order"), accept)
    with pytest.raises(ValueError, match="this device accepts the bases 0123abcd, got 'ffffffffffff'"):
        check_base("f" * 64, accept)
    assert accepted(lambda: check_task(make_task(strategy="x", tuner="y"), Accept()))  # empty lists leave it open


WALL = """
import sys, torch
from fedloom.client.agent.limits import memory_wall
from fedloom.client.memory import peak_rss
with memory_wall(peak_rss() + 100 * 10**6):
    torch.ones(10 * 10**6)
    try:
        torch.ones(100 * 10**6)
    except RuntimeError as error:
        sys.stdout.write("can't allocate memory" in str(error) and "refused ")
    try:
        bytearray(400 * 10**6)
    except MemoryError:
        sys.stdout.write("refused ")
torch.ones(100 * 10**6)
sys.stdout.write("free")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say what a process holds")
def test_memory_beyond_the_wall_is_an_error_and_not_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", WALL], capture_output=True, text=True, check=True)
    assert done.stdout == "refused refused free"
