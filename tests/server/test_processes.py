"""Processes of a run: they end with their server, and are found whatever became of their parents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedloom.server.processes import birth, claim, end_all, is_alive, processes_of, start_tethered

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# A process that starts another in a session of its own, as Flower does, and tells its number.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
# A server that starts a tethered process and is then killed.
SERVER = """
import sys, time
from pathlib import Path
from fedloom.server.processes import start_tethered
out = Path(sys.argv[1])
process = start_tethered([sys.executable, "-c", "import time; time.sleep(60)"], out, log=out / "log", environment={})
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    end_all(tmp_path)


def _within(seconds: float, what: object, true: bool = True) -> bool:
    until = time.monotonic() + seconds
    while bool(what()) != true and time.monotonic() < until:  # type: ignore[operator]
        time.sleep(0.02)
    return bool(what()) == true  # type: ignore[operator]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_tethered_process_ends_with_a_server_that_is_killed(out: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER, str(out)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        born = birth(pid)
        assert _within(5, lambda: "time.sleep" in " ".join(psutil.Process(pid).cmdline()))
        server.send_signal(signal.SIGKILL)
    assert _within(5, lambda: is_alive(pid, born), False)


def test_a_command_whose_parent_died_before_it_began_does_not_run(out: Path) -> None:
    tether = Path(sys.modules["fedloom.server.processes"].__file__ or "").with_name("tether.py")
    done = subprocess.run([sys.executable, tether, "1", "touch", str(out / "ran")], check=False)
    assert done.returncode == 1
    assert not (out / "ran").exists()


def test_orphans_are_found_and_ended(out: Path) -> None:
    log = out / "log"
    process = start_tethered([sys.executable, "-c", PARENT], out, log=log, environment={"SOME": "thing"})
    assert _within(10, lambda: log.read_text().strip())
    orphan = psutil.Process(int(log.read_text()))
    assert {found.pid for found in processes_of(out)} == {process.pid, orphan.pid}
    assert orphan.environ()["SOME"] == "thing"
    process.kill()
    process.wait()
    assert [found.pid for found in processes_of(out)] == [orphan.pid]
    assert end_all(out) == 1
    assert _within(5, orphan.is_running, False)


def test_what_ignores_a_request_to_end_is_killed(out: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True)"
    process = start_tethered(
        [sys.executable, "-c", f"{stubborn}; time.sleep(60)"], out, log=out / "log", environment={}
    )
    assert _within(10, lambda: "deaf" in (out / "log").read_text())
    began = time.monotonic()
    assert end_all(out, patience=0.3) >= 1
    assert time.monotonic() - began < 5
    assert not psutil.pid_exists(process.pid)


def test_processes_of_another_run_are_let_be(out: Path) -> None:
    (out / "a").mkdir()
    (out / "b").mkdir()
    start_tethered(SLEEP, out / "a", log=out / "log", environment={})
    assert end_all(out / "b") == 0
    assert end_all(out / "a") == 1


def test_a_number_is_not_enough_to_be_alive() -> None:
    mine, born = os.getpid(), birth(os.getpid())
    assert is_alive(mine, born)
    assert not is_alive(mine, born - 60)
    assert not is_alive(2**22 + 1, born)


def test_a_process_is_the_same_after_the_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting the clock moves the time at which Linux says that it was started, and so psutil's times of processes."""
    mine, born, there = os.getpid(), birth(os.getpid()), psutil.Process().create_time()
    moved = psutil.boot_time() + 7200
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: moved)
    assert psutil.Process().create_time() == pytest.approx(there + 7200, abs=1)
    assert birth(mine) == born
    assert is_alive(mine, born)


def test_a_process_may_have_any_name(out: Path) -> None:
    name = out / "a) S 1 (b"
    name.symlink_to(sys.executable)
    with subprocess.Popen([str(name), "-S", "-c", "import time; time.sleep(60)"]) as process:
        assert _within(5, lambda: ") S 1 (" in Path(f"/proc/{process.pid}/stat").read_text())
        born = birth(process.pid)
        assert born - birth(os.getpid()) >= 0
        assert is_alive(process.pid, born)
        process.kill()
        assert _within(5, lambda: is_alive(process.pid, born), False)  # a zombie until it is waited for


def test_a_folder_has_one_server(out: Path) -> None:
    start_tethered(SLEEP, out, log=out / "log", environment={})
    with claim(out) as orphans:
        assert orphans == 1
        with (
            pytest.raises(ValueError, match=rf"is served by another `fedloom server` \(process {os.getpid()}\)"),
            claim(out),
        ):
            pass
    with claim(out) as orphans:
        assert orphans == 0
