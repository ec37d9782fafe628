"""Keeps a deployed run going until it is finished: whatever part of it dies is started again.

A dead ServerApp is known by its process within a second, where Flower's heartbeats take 40 to 60. The round loop goes
on from its checkpoint and journal, so starting again is all that recovery is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from fedloom.server.admission import Admission
from fedloom.server.dashboard.tail import Tail
from fedloom.server.disk import check_room, room_for
from fedloom.server.events import EVENTS_FILE, EventLog
from fedloom.server.guestbook import VISITS_FILE
from fedloom.server.orders import Orders, write_orders
from fedloom.server.processes import end, is_alive
from fedloom.server.standing import Stage, Standing, read_standing
from fedloom.server.superlink import FOLDER, LOG_FILE, Uplink

CHECKPOINTS = "checkpoints"
TICK, KEYS_SECONDS, LINK_SECONDS, ASK_SECONDS = 0.1, 2.0, 1.0, 3.0
ROOM_SECONDS = 0.5
ALL_KEYS_SECONDS = 60.0
BEGIN_SECONDS = 120.0  # a ServerApp must have said something by then
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 5.0
STALE_SECONDS = 15.0  # for a ServerApp of an earlier server to end once its run is stopped
MOST_DEATHS = 20  # of ServerApp or SuperLink, without a round between them
KILLED, LOST = "killed", "lost"  # endings that are nobody's mistake; so are those of these kinds and beginnings:
LOST_KINDS = {"SystemExit", "KeyboardInterrupt", "RunNotRunningException", "HTTPStatusError", "ConnectError"}
LOST_KINDS |= {"ReadError", "WriteError", "ReadTimeout", "ConnectTimeout", "PoolTimeout", "RemoteProtocolError"}
LOST_WORDS = ("Flower error", "Flower did not take", "no answer within")


class RunError(Exception):
    """A run that cannot go on, for a reason that is not a mistake in its input. One line."""


class Teller(Protocol):
    """Tells a person what happens."""

    def say(self, line: str, *, bad: bool = False) -> None: ...

    def event(self, event: Mapping[str, Any]) -> None:
        """A line of events.jsonl, as the round loop wrote it."""
        ...

    def visit(self, visit: Mapping[str, Any]) -> None:
        """A line of door.jsonl: who connected, and who was refused."""
        ...

    def waits(self, connected: int, needed: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one ServerApp ended: finished, or with an error (a line) and its kind (the exception's name, or killed)."""

    finished: bool = False
    error: str = ""
    kind: str = ""


class Attempt:
    """One ServerApp, from the submission of its run."""

    def __init__(self, out: Path, uplink: Uplink, run: int) -> None:
        self._out, self._uplink, self.run = out, uplink, run
        self._began = self._asked = time.monotonic()
        self._process_seen = False

    def standing(self) -> Standing | None:
        """What it says of itself; None before it has said anything."""
        standing = read_standing(self._out)
        return standing if standing is not None and standing.run_id == self.run else None

    def ending(self) -> Ending | None:
        """How it ended; None while it goes on."""
        standing = self.standing()
        if standing is None:
            return self._before_it_spoke()
        if standing.stage == Stage.FINISHED:
            return Ending(finished=True)
        if standing.stage == Stage.FAILED:
            return _failure(standing)
        if is_alive(standing.pid, standing.born) or self.standing() != standing:
            return None
        return Ending(error="the ServerApp was killed", kind=KILLED)

    def _before_it_spoke(self) -> Ending | None:
        now = time.monotonic()
        if self._uplink.server_apps():
            self._process_seen = True
        ended = self._process_seen and not self._uplink.server_apps()
        if ended or now - self._asked >= ASK_SECONDS:
            self._asked = now
            status = self._uplink.control.run_status(self.run)
            if self.standing() is not None:
                return None
            if status.over:
                why = " ".join(status.details.split()) or f"Flower ended the run ({status.ending})"
                return Ending(error=f"{why}; see {self._log}", kind=status.ending)
            if ended:
                return Ending(error=f"the ServerApp ended before it began; see {self._log}", kind=KILLED)
        if now - self._began > BEGIN_SECONDS:
            return Ending(error=f"no ServerApp began within {BEGIN_SECONDS:g} s; see {self._log}", kind=LOST)
        return None

    @property
    def _log(self) -> Path:
        return self._out / FOLDER / LOG_FILE


class Supervisor:
    """One run, from start to finish. `run` returns when it is finished, and leaves no process behind."""

    def __init__(self, orders: Orders, out: Path, uplink: Uplink, admission: Admission, teller: Teller) -> None:
        self._orders, self._out, self._uplink = orders, out, uplink
        self._admission, self._teller = admission, teller
        self._events, self._visits = Tail(out / EVENTS_FILE), Tail(out / FOLDER / VISITS_FILE)
        self._attempt: Attempt | None = None
        self._due: dict[str, float] = {}
        self._progress = False  # whether a round was finished in this attempt
        self._failures, self._deaths = 0, 0
        self._error = ""

    def run(self) -> None:
        """Go on until the run is finished.

        Raises:
            ValueError: for what the run itself refuses, twice in a row, for settings that cannot work, and a full disk.
            RunError: for anything else that keeps it from going on.
        """
        for tail in (self._events, self._visits):
            list(_read(tail))  # what was told before
        try:
            with room_for(self._out):
                check_room(self._out)
                self._begin()
                while not self._is_finished():
                    time.sleep(TICK)
        except BaseException as error:
            self._close()
            with suppress(OSError):
                self._note_stop(" ".join(str(error).split()) or "the server was stopped")
            raise
        self._close()

    def _begin(self) -> None:
        from fedloom.server.checkpoint import latest_checkpoint  # here, since it loads NumPy

        for complaint in latest_checkpoint(self._out / CHECKPOINTS)[1]:
            self._teller.say(f"{complaint}; going back to the one before", bad=True)
        self._admission.post()
        try:
            self._uplink.start()
        except ConnectionError as error:
            raise RunError(str(error)) from None
        self._keep_keys()
        self._stop_stale()
        self._submit()

    def _is_finished(self) -> bool:
        """One look at everything; puts right what is broken."""
        self._tell()
        if self._is_due("keys", KEYS_SECONDS) and (self._admission.changed() or self._is_due("all", ALL_KEYS_SECONDS)):
            self._keep_keys()
        if self._is_due("link", LINK_SECONDS) and (problem := self._uplink.problem()):
            self._restart_link(problem)
            return False
        try:
            ending = self._attempt.ending() if self._attempt else None
        except ConnectionError:
            return False  # the next look at the SuperLink tells
        if ending is None:
            if self._is_due("room", ROOM_SECONDS):
                check_room(self._out)  # before the SuperLink, and each device by it, fails in its own way
            return False
        self._tell()
        if not ending.finished and (problem := self._uplink.problem()):
            self._restart_link(problem)  # which is why the ServerApp ended
        elif not ending.finished:
            self._again(ending)
        return ending.finished

    def _again(self, ending: Ending) -> None:
        """Start the ServerApp once more, after a pause that grows while nothing gets better."""
        self._count(ending)
        pause = self._pause()
        when = f"in {pause:g} s" if pause else "at once"
        self._teller.say(f"{ending.error}; starting again {when}", bad=True)
        self._end_attempt()
        time.sleep(pause)
        self._submit()

    def _restart_link(self, problem: str) -> None:
        self._teller.say(f"SuperLink: {problem}; starting it again", bad=True)
        self._count(Ending(error=f"SuperLink: {problem}", kind=KILLED))
        self._uplink.stop()
        time.sleep(self._pause())
        self._uplink.start()
        self._keep_keys()
        self._end_attempt()
        self._stop_stale()
        self._submit()

    def _count(self, ending: Ending) -> None:
        """Count failures since the last finished round; give up where another try cannot help."""
        if self._progress:
            self._failures = self._deaths = 0
            self._error = ""
        self._progress = False
        self._failures += 1
        if ending.kind in (KILLED, LOST):
            self._deaths += 1
            if self._deaths > MOST_DEATHS:
                raise RunError(f"{ending.error}, {self._deaths} times without a finished round between them")
        elif ending.error == self._error:
            raise (ValueError if ending.kind == "ValueError" else RunError)(ending.error)
        else:
            self._error = ending.error

    def _pause(self) -> float:
        """Seconds to wait before the next try: none after the first failure, then twice as long each time."""
        return min(FIRST_PAUSE * 2.0 ** (self._failures - 2), LONGEST_PAUSE) if self._failures > 1 else 0.0

    def _submit(self) -> None:
        """Hand the run to the SuperLink, as the keys folder and the recipe are now."""
        write_orders(self._out, replace(self._orders, names=self._admission.names))
        until = time.monotonic() + BEGIN_SECONDS
        while not self._uplink.problem():  # where there is one, the next look at the SuperLink puts it right
            try:
                self._attempt = Attempt(self._out, self._uplink, self._uplink.submit())
                return
            except ConnectionError as error:
                if time.monotonic() >= until:
                    raise RunError(str(error)) from None
                time.sleep(0.5)

    def _end_attempt(self, *, stop: bool = False) -> None:
        """Make sure that nothing of the last attempt still works here.

        Flower keeps its run, unless it never began: a device that is just pulling a task from it would lose count of
        its messages (presence.py). It works on that task, and has the answer ready when the next ServerApp asks.
        """
        end(self._uplink.server_apps())
        if self._attempt is not None:
            if stop or self._attempt.standing() is None:
                with suppress(ConnectionError):
                    self._uplink.control.stop_run(self._attempt.run)
            _await_end(self._attempt)
        self._attempt = None

    def _stop_stale(self) -> None:
        """Stop what Flower still counts as under way of this folder's runs, and a ServerApp that works on it.

        A killed server leaves such a run. On a SuperLink that was joined, its ServerApp goes on too, and the next one
        would wait for it in vain. Other people's runs there are not touched.
        """
        try:
            stale = self._uplink.stale_runs()
            for run in stale:
                self._uplink.control.stop_run(run)
        except (ValueError, ConnectionError) as error:
            self._teller.say(f"runs of an earlier server could not be stopped: {error}", bad=True)
            return
        if not stale:
            return
        numbers = ", ".join(map(str, stale))
        self._teller.say(f"stopped what was left running in Flower from before: run {numbers}")
        standing = read_standing(self._out)
        if standing is not None and standing.run_id in stale:
            _await_end(Attempt(self._out, self._uplink, standing.run_id), STALE_SECONDS)
            if is_alive(standing.pid, standing.born):
                with suppress(psutil.Error):
                    end([psutil.Process(standing.pid)])

    def _keep_keys(self) -> None:
        try:
            for line in self._admission.sync(self._uplink.control):
                self._teller.say(line)
            self._due["all"] = time.monotonic() + ALL_KEYS_SECONDS
        except (ValueError, ConnectionError) as error:
            self._teller.say(f"keys: {error}", bad=True)

    def _tell(self) -> None:
        """Pass on what was written since the last look."""
        for event in _read(self._events):
            self._progress |= event.get("event") == "round"
            self._teller.event(event)
        for visit in _read(self._visits):
            self._teller.visit(visit)
        standing = self._attempt.standing() if self._attempt else None
        if standing is not None and standing.stage == Stage.WAITING:
            self._teller.waits(standing.connected, standing.needed)

    def _is_due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + every
        return True

    def _close(self) -> None:
        """Leave nothing running."""
        if not self._uplink.own:
            self._end_attempt(stop=True)
        self._uplink.stop(patience=3.0)

    def _note_stop(self, reason: str) -> None:
        events = EventLog(self._out / EVENTS_FILE)
        events.stopped(reason)
        events.close()


def _failure(standing: Standing) -> Ending:
    """How a ServerApp failed by its own words; what Flower or a signal did to it is not the run's mistake."""
    if standing.kind in ("SystemExit", "KeyboardInterrupt"):
        return Ending(error="the ServerApp was told to end", kind=LOST)
    lost = standing.kind in LOST_KINDS or standing.error.startswith(LOST_WORDS)
    return Ending(error=standing.error, kind=LOST if lost else standing.kind)


def _await_end(attempt: Attempt, seconds: float = 15.0) -> None:
    """Wait until a ServerApp that was told to stop has ended."""
    until = time.monotonic() + seconds
    while (standing := attempt.standing()) and is_alive(standing.pid, standing.born) and time.monotonic() < until:
        time.sleep(TICK)


def _read(tail: Tail) -> Iterator[Mapping[str, Any]]:
    """The JSON objects that were added to a file; lines that are none are left out."""
    while True:
        found = tail.read()
        for line in found.lines:
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event
        if not found.more:
            return
