"""What the supervisor does when things die. Its SuperLink starts real processes, which play a ServerApp by a script."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedloom.protocols.config import RunConfig
from fedloom.server import supervisor as module
from fedloom.server.admission import Admission
from fedloom.server.control import RunStatus
from fedloom.server.orders import Orders, read_orders
from fedloom.server.processes import birth, end_all, processes_of, start_tethered
from fedloom.server.standing import Stage, Standing, write_standing
from fedloom.server.supervisor import RunError, Supervisor

# A ServerApp: argv is OUT, Flower's run number, and steps. It says where it stands as the real one does.
PLAYER = """
import os, sys, time
from pathlib import Path
from fedloom.server.events import EventLog
from fedloom.server.processes import birth
from fedloom.server.standing import Stage, Standing, write_standing
out, run = Path(sys.argv[1]), int(sys.argv[2])
def post(stage, **about):
    pid = os.getpid()
    write_standing(out, Standing(
        pid=pid, born=birth(pid), run_id=run, stage=Stage(stage), **about))
for step in sys.argv[3:]:
    name, _, value = step.partition(":")
    if name == "mute":
        sys.exit(1)
    elif name == "round":
        events = EventLog(out / "events.jsonl")
        events.ended(record={"round": int(value)})
    elif name == "waiting":
        post("waiting", connected=1, needed=int(value))
        time.sleep(0.5)
    elif name in ("ValueError", "OSError", "ConnectError", "SystemExit"):
        post("failed", error=value, kind=name)
    elif name == "die":
        os.kill(os.getpid(), 9)
    else:
        post(name)
"""


class Register:
    """What is asked of Flower's Control API here."""

    def __init__(self) -> None:
        self.stopped: list[int] = []
        self.status = RunStatus(status="running")
        self.refuses = False

    def stop_run(self, run: int) -> None:
        self.stopped.append(run)
        if self.refuses:
            raise ConnectionError("SuperLink cannot be reached")

    def run_status(self, run: int) -> RunStatus:
        return self.status


class StageLink:
    """Starts a player for each submission, by the next script; the last script is played again and again."""

    own = True

    def __init__(self, out: Path, scripts: list[str]) -> None:
        self._out, self.scripts = out, scripts
        self.control: Any = Register()
        self.submitted, self.starts, self.stops = 0, 0, 0
        self.problems: list[str] = []
        self.stale: list[int] = []
        self.players: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.starts += 1

    def submit(self) -> int:
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        self.submitted += 1
        command = [sys.executable, "-c", PLAYER, str(self._out), str(self.submitted), *script.split(",")]
        self.players.append(start_tethered(command, self._out, log=self._out / "log", environment={}))
        return self.submitted

    def stale_runs(self) -> list[int]:
        stale, self.stale = self.stale, []
        return stale

    def problem(self) -> str:
        return self.problems.pop(0) if self.problems else ""

    def server_apps(self) -> list[psutil.Process]:
        return processes_of(self._out)

    def stop(self, *, patience: float = 0.0) -> None:
        self.stops += 1
        end_all(self._out)


class Memory:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.events: list[str] = []
        self.waited: list[tuple[int, int]] = []

    def say(self, line: str, *, bad: bool = False) -> None:
        self.lines.append(line)

    def event(self, event: Mapping[str, Any]) -> None:
        self.events.append(event["event"])

    def visit(self, visit: Mapping[str, Any]) -> None:
        self.lines.append(f"visit {visit['event']}")

    def waits(self, connected: int, needed: int) -> None:
        self.waited.append((connected, needed))


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "superlink").mkdir()
    yield tmp_path
    end_all(tmp_path)


def supervise(out: Path, *scripts: str) -> tuple[Supervisor, StageLink, Memory]:
    link, memory = StageLink(out, list(scripts)), Memory()
    admission = Admission(None, out / "superlink", limit=1000)
    orders = Orders(config=RunConfig(), run="abc")
    return Supervisor(orders, out, link, admission, memory), link, memory


def last_event(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "events.jsonl").read_text().splitlines()[-1])
    return found


def test_a_run_that_finishes_is_submitted_once(out: Path) -> None:
    supervisor, link, memory = supervise(out, "waiting:3,round:1,finished")
    supervisor.run()
    assert (link.submitted, link.starts, link.stops) == (1, 1, 1)
    assert memory.events == ["round"]
    assert (1, 3) in memory.waited
    assert read_orders(out).run == "abc"
    assert json.loads((out / "superlink" / "door.json").read_text())["known"] is None


def test_a_server_app_that_is_killed_is_started_again_within_a_second(out: Path) -> None:
    supervisor, link, memory = supervise(out, "started,die", "finished")
    supervisor.run()
    assert link.submitted == 2
    assert link.control.stopped == []  # a device may be fetching its task
    assert "the ServerApp was killed; starting again at once" in memory.lines


def test_the_same_mistake_twice_ends_the_run(out: Path) -> None:
    supervisor, link, _ = supervise(out, "ValueError:a run needs apples")
    with pytest.raises(ValueError, match=r"^a run needs apples$"):
        supervisor.run()
    assert link.submitted == 2
    assert last_event(out)["reason"] == "a run needs apples"
    assert processes_of(out) == []


def test_another_kind_of_error_is_no_mistake_of_the_input(out: Path) -> None:
    supervisor, _, _ = supervise(out, "OSError:disk full")
    with pytest.raises(RunError, match=r"^disk full$"):
        supervisor.run()


def test_progress_between_two_errors_makes_them_two_first_ones(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.0)
    supervisor, link, memory = supervise(
        out, "OSError:lost", "round:1,OSError:lost", "round:2,OSError:lost", "OSError:other", "finished"
    )
    supervisor.run()
    assert link.submitted == 5
    assert memory.events == ["round", "round"]


def test_what_dies_all_the_time_is_given_up(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_DEATHS", 3)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.0)
    supervisor, link, _ = supervise(out, "started,die")
    with pytest.raises(RunError, match="the ServerApp was killed, 4 times without a finished round between them"):
        supervisor.run()
    assert link.submitted == 4


@pytest.mark.parametrize(
    "failure", ["ValueError:Flower error 5: Node Unavailable", "ConnectError:refused", "SystemExit:0"]
)
def test_what_flower_or_a_signal_did_is_tried_again(out: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.0)
    supervisor, link, memory = supervise(out, failure, failure, failure, "finished")
    supervisor.run()
    assert link.submitted == 4
    assert all("0; starting" not in line for line in memory.lines)


def test_pauses_grow_while_nothing_gets_better(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.25)
    supervisor, _, memory = supervise(out, "started,die", "started,die", "started,die", "finished")
    began = time.monotonic()
    supervisor.run()
    assert time.monotonic() - began > 0.75
    assert [line.partition("; ")[2] for line in memory.lines] == [
        "starting again at once",
        "starting again in 0.25 s",
        "starting again in 0.5 s",
    ]


def test_a_server_app_that_never_speaks_is_an_error_with_flowers_reason(out: Path) -> None:
    supervisor, link, _ = supervise(out, "mute")
    link.control.status = RunStatus(status="finished", ending="failed", details="no module\nnamed x")
    with pytest.raises(RunError, match=r"^no module named x; see .*superlink.log$"):
        supervisor.run()
    assert link.submitted == 2
    assert link.control.stopped == [1]


def test_a_superlink_that_dies_is_started_again_and_given_the_run_again(out: Path) -> None:
    supervisor, link, memory = supervise(out, "started,waiting:1,waiting:1,waiting:1,waiting:1", "finished")
    link.problems = ["", "it was killed (signal 9)"]
    supervisor.run()
    assert (link.submitted, link.starts, link.stops) == (2, 2, 2)
    assert "SuperLink: it was killed (signal 9); starting it again" in memory.lines


def test_what_a_killed_server_left_running_in_flower_is_stopped_first(out: Path) -> None:
    supervisor, link, memory = supervise(out, "finished")
    link.stale = [7, 9]
    supervisor.run()
    assert link.control.stopped == [7, 9]
    assert memory.lines == ["stopped what was left running in Flower from before: run 7, 9"]
    assert link.submitted == 1


def test_a_server_app_that_outlived_its_server_is_ended_before_the_next_begins(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a SuperLink that was joined nobody else ends it, and it would hold the folder's lock."""
    monkeypatch.setattr(module, "STALE_SECONDS", 0.2)
    supervisor, link, _ = supervise(out, "finished")
    link.stale = [7]
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        born = birth(left.pid)
        write_standing(out, Standing(pid=left.pid, born=born, run_id=7, stage=Stage.RUNNING))
        supervisor.run()
        assert left.poll() is not None
        write_standing(out, Standing(pid=other.pid, born=born + 60, run_id=7, stage=Stage.RUNNING))
        supervisor, link, _ = supervise(out, "finished")
        link.stale = [7]
        supervisor.run()
        assert other.poll() is None  # a number that another program has by now
    finally:
        for process in (left, other):
            process.kill()
            process.wait()


def test_runs_that_cannot_be_stopped_are_told_and_the_run_goes_on(out: Path) -> None:
    supervisor, link, memory = supervise(out, "finished")
    link.stale, link.control.refuses = [7], True
    supervisor.run()
    assert memory.lines == ["runs of an earlier server could not be stopped: SuperLink cannot be reached"]
    assert link.submitted == 1


def test_a_stop_ends_everything_and_is_written_down(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor, link, memory = supervise(out, "started,waiting:1,waiting:1,waiting:1,waiting:1,waiting:1,waiting:1")

    def interrupt(connected: int, needed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "waits", interrupt)
    with pytest.raises(KeyboardInterrupt):
        supervisor.run()
    assert link.stops == 1
    assert processes_of(out) == []
    assert last_event(out)["event"] == "stopped"


def test_what_was_told_before_is_not_told_again(out: Path) -> None:
    (out / "events.jsonl").write_text('{"event": "round", "round": 1}\n')
    (out / "superlink" / "door.jsonl").write_text('{"event": "connected"}\n')
    supervisor, _, memory = supervise(out, "round:2,finished")
    supervisor.run()
    assert memory.events == ["round"]
    assert memory.lines == []
