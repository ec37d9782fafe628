"""A run as its event log tells it: where it stands, and sums for each device; memory does not grow with the log."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fedloom.protocols.messages import NOT_NOW
from fedloom.server.dashboard.fields import DEVICE_LIMIT, count_of, name_of, names_of, number_of, table_of, text_of
from fedloom.server.dashboard.rounds import Round, Rounds, read_round

REFUSAL_LIMIT = 20
OPEN_LIMIT = 64  # unfinished rounds that a device's sums are kept apart for


class Status(StrEnum):
    """Where a run stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"


class Standing(StrEnum):
    """What a device was last heard to do."""

    UNSEEN = "not seen yet"
    JOINED = "joined"
    TRAINING = "training"
    EVALUATING = "evaluating"
    ANSWERED = "answered"
    REFUSED = "refused"
    NOT_NOW = "not now"
    NOT_NEEDED = "not needed"
    LEFT_OUT = "left out"
    SILENT = "no answer"


@dataclass(slots=True, kw_only=True)
class Tally:
    """What a device did in rounds: bytes `up` of its answers, `down` of its tasks."""

    rounds: int = 0
    refused: int = 0
    up: int = 0
    down: int = 0

    def add(self, other: Tally) -> None:
        for name in ("rounds", "refused", "up", "down"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True, kw_only=True)
class Device:
    """A device, from what the log says of it; `why` it stands so, and the last round `until` which it sits out."""

    name: str
    standing: Standing = Standing.UNSEEN
    why: str = ""
    about: tuple[str, ...] = ()
    seen: float | None = None
    seconds: float | None = None
    until: int = 0
    closed: Tally = field(default_factory=Tally)
    open: dict[int, Tally] = field(default_factory=dict)

    def total(self) -> Tally:
        """Over finished rounds and those that are not."""
        total = Tally()
        for part in (self.closed, *self.open.values()):
            total.add(part)
        return total

    def stands(self, standing: Standing, why: str = "") -> None:
        self.standing, self.why = standing, why

    def close(self, round: int) -> None:
        """Take the sums of rounds up to `round` as done."""
        for done in [number for number in self.open if number <= round]:
            self.closed.add(self.open.pop(done))

    def tally(self, round: int) -> Tally:
        if round not in self.open and len(self.open) >= OPEN_LIMIT:
            self.close(min(self.open))
        return self.open.setdefault(round, Tally())


@dataclass(slots=True, kw_only=True)
class Phase:
    """The part of a round that runs: how many were asked, who has not answered."""

    name: str
    round: int
    asked: int
    since: float | None
    waiting: set[str]
    answered: int = 0


@dataclass(frozen=True, kw_only=True)
class Incident:
    """An answer that was not taken (`until` 0), or a device that was sent to rest up to round `until`.

    With `greeting`, a device that was asked who it is and does not take part.
    """

    time: float | None
    round: int
    device: str
    reason: str
    until: int = 0
    greeting: bool = False


class RunState:
    """Apply events in their order; then read the attributes.

    Attributes:
        latest: when the last event came, in Unix seconds.
        round: the last finished round; -1 before any.
        starts: how often a server has begun or gone on with the run.
    """

    def __init__(self) -> None:
        self.status = Status.WAITING
        self.run = self.name = self.strategy = self.reason = ""
        self.round, self.total, self.starts = -1, 0, 0
        self.latest: float | None = None
        self.phase: Phase | None = None
        self.devices: dict[str, Device] = {}
        self.crowded = False
        self.rounds = Rounds()
        self.incidents: deque[Incident] = deque(maxlen=REFUSAL_LIMIT)

    def apply(self, event: Mapping[str, Any]) -> None:
        """Note one event; unknown ones are passed over, so that a newer log can be read.

        Raises:
            ValueError: for a known event without what it must have.
        """
        kind = event.get("event")
        take = _HANDLERS.get(kind) if isinstance(kind, str) else None
        if take is not None:
            take(self, event)
        moment = _moment(event)
        self.latest = self.latest if moment is None else moment

    def device(self, name: str) -> Device | None:
        """The device of this name, new ones included; None once there are too many to keep."""
        if name not in self.devices:
            if len(self.devices) >= DEVICE_LIMIT:
                self.crowded = True
                return None
            self.devices[name] = Device(name=name)
        return self.devices[name]

    def current(self) -> int:
        """The round that runs, or else the last that did; -1 before any."""
        return self.phase.round if self.phase and self.phase.name != "hello" else self.round

    def is_resting(self, device: Device) -> bool:
        """Whether it sits out the round that runs or comes next."""
        return device.until > max(0, self.round)

    def _started(self, event: Mapping[str, Any]) -> None:
        """A server begins, or goes on after its last finished round: what came after that is done again."""
        round = count_of(event, "round", least=-1)
        self.run, self.name = text_of(event, "run"), text_of(event, "name")
        self.strategy, self.total = text_of(event, "strategy"), count_of(event, "rounds")
        for name in names_of(event, "devices", most=DEVICE_LIMIT):
            self.device(name)
        for device in self.devices.values():
            device.close(round)
            device.open.clear()
            if device.standing in (Standing.TRAINING, Standing.EVALUATING):
                device.stands(Standing.SILENT)
        self.rounds.drop_after(round)
        self.status, self.reason, self.round, self.phase = Status.RUNNING, "", round, None
        self.starts += 1

    def _joined(self, event: Mapping[str, Any]) -> None:
        device = self.device(name_of(event))
        if device is None:
            return
        about = []
        if event.get("examples") is not None:
            about.append(f"{count_of(event, 'examples'):,} examples")
        if event.get("rank"):
            about.append(f"rank {count_of(event, 'rank')}")
        about += [name[:24] for name in names_of(event, "capabilities", most=4)]
        device.about, device.seen = tuple(about), _moment(event)
        device.stands(Standing.JOINED)

    def _left_out(self, event: Mapping[str, Any]) -> None:
        """One that said hello and cannot take part; it is asked again, and says the same, before every round."""
        name, reason = name_of(event), text_of(event, "reason")
        self._note(Incident(time=_moment(event), round=0, device=name, reason=reason, greeting=True))
        if device := self.device(name):
            device.seen = _moment(event)
            device.stands(Standing.LEFT_OUT, reason)

    def _phase(self, event: Mapping[str, Any]) -> None:
        name, asked = text_of(event, "phase", limit=24), names_of(event, "devices", most=DEVICE_LIMIT)
        phase = Phase(
            name=name, round=count_of(event, "round"), asked=len(asked), since=_moment(event), waiting=set(asked)
        )
        self._end_phase()
        self.phase, self.status, self.reason = phase, Status.RUNNING, ""
        self.total = count_of(event, "rounds") or self.total
        if name == "hello":  # its names are of nodes, which have not said who they are
            return
        for device in filter(None, map(self.device, asked)):
            device.stands(Standing.TRAINING if name == "train" else Standing.EVALUATING)

    def _answer(self, event: Mapping[str, Any]) -> None:
        name, round, refused = name_of(event), count_of(event, "round"), text_of(event, "refused")
        up, down, phase = count_of(event, "bytes"), count_of(event, "down"), text_of(event, "phase", limit=24)
        not_now = refused.startswith(NOT_NOW)
        greeting = phase == "hello"
        if refused and (greeting or not not_now):
            self._note(Incident(time=_moment(event), round=round, device=name, reason=refused, greeting=greeting))
        if self.phase and self.phase.name == phase and (greeting or name in self.phase.waiting):
            self.phase.waiting.discard(name)
            self.phase.answered += 1
        device = None if greeting else self.device(name)
        if device is None:
            return
        if not_now:
            device.stands(Standing.NOT_NOW, refused.removeprefix(NOT_NOW))
        else:
            device.stands(Standing.REFUSED if refused else Standing.ANSWERED)
        device.seen = _moment(event) if up else device.seen  # a device that was not there sent nothing
        device.seconds = number_of(event, "seconds") or device.seconds
        tally = device.tally(round)
        tally.up += up
        tally.down += down
        tally.refused += bool(refused and not not_now)
        tally.rounds = max(tally.rounds, int(phase == "train" and not refused))

    def _unneeded(self, event: Mapping[str, Any]) -> None:
        """One that was asked and is not waited for: as if it had not been, but for the bytes of its task."""
        name, round, down = name_of(event), count_of(event, "round"), count_of(event, "down")
        if self.phase and name in self.phase.waiting:
            self.phase.waiting.discard(name)
            self.phase.asked -= 1
        if device := self.device(name):
            device.stands(Standing.NOT_NEEDED)
            device.tally(round).down += down

    def _quarantined(self, event: Mapping[str, Any]) -> None:
        name, until = name_of(event), count_of(event, "until")
        incident = Incident(
            time=_moment(event), round=self.current(), device=name, reason=text_of(event, "reason"), until=until
        )
        self._note(incident)
        if device := self.device(name):
            device.until = until

    def _note(self, incident: Incident) -> None:
        """Put it first. Who does not take part is asked before every round: the same answer again takes its place."""
        told = (incident.device, incident.reason)
        if incident.greeting:
            for old in [old for old in self.incidents if old.greeting and (old.device, old.reason) == told]:
                self.incidents.remove(old)
        self.incidents.appendleft(incident)

    def _round(self, event: Mapping[str, Any]) -> None:
        done: Round = read_round(table_of(event, "record"))
        self._end_phase()
        self.rounds.add(done)
        self.round, self.status = done.round, Status.RUNNING
        for device in self.devices.values():
            device.close(done.round)

    def _finished(self, event: Mapping[str, Any]) -> None:
        self._end_phase()
        self.status = Status.FINISHED

    def _stopped(self, event: Mapping[str, Any]) -> None:
        reason = text_of(event, "reason")
        self._end_phase()
        self.status, self.reason = Status.STOPPED, reason

    def _end_phase(self) -> None:
        """Who has not answered by now is not waited for."""
        for name in self.phase.waiting if self.phase else ():
            device = self.devices.get(name)
            if device and device.standing in (Standing.TRAINING, Standing.EVALUATING):
                device.stands(Standing.SILENT)
        self.phase = None


_HANDLERS = {
    "started": RunState._started,
    "joined": RunState._joined,
    "left_out": RunState._left_out,
    "phase": RunState._phase,
    "answer": RunState._answer,
    "unneeded": RunState._unneeded,
    "quarantined": RunState._quarantined,
    "round": RunState._round,
    "finished": RunState._finished,
    "stopped": RunState._stopped,
}


def _moment(event: Mapping[str, Any]) -> float | None:
    """An event's time, where a calendar has it."""
    moment = number_of(event, "time")
    return moment if moment is not None and 0 <= moment < 2**36 else None
