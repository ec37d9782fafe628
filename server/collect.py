"""One phase of a round: its tasks out, its answers in, the good ones handed on in the order of the tasks.

Sums of floats depend on their order, and a run shall give the same bytes on every engine, whichever device was faster.
So an answer that comes early waits for those before it: in the journal where there is one, else in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedloom.protocols.codec import TaskEncoder, decode_answer
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import NOT_NOW, Kind, Refusal, Task, Update
from fedloom.protocols.validate import one_line
from fedloom.server.courier import Courier, Parcel, Reply
from fedloom.server.intake import NO_REASON, check_refusal, check_update, without_tensors
from fedloom.server.journal import Entry, Journal
from fedloom.server.ledger import Ledger
from fedloom.server.roster import Roster
from fedloom.server.watch import Watcher

log = logging.getLogger("fedloom.server")


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What every phase of a run works with."""

    config: RunConfig
    courier: Courier
    roster: Roster
    ledger: Ledger
    watcher: Watcher

    @property
    def largest_frame(self) -> int:
        """Bytes; a longer answer is refused before it is read."""
        return largest_frame(self.config)


def largest_frame(config: RunConfig) -> int:
    """The most bytes that a message of a recipe's run may have."""
    return config.wire.limit_mb * 2**20


class Reception:
    """Where tasks become bytes and answers are held against them; what follows is noted: bytes, versions, standing.

    Attributes:
        refusals: a line for each answer that was not taken.
        down: bytes of the task that each device was sent last.
    """

    def __init__(self, desk: Desk, kind: Kind) -> None:
        self._desk, self._kind = desk, kind
        self.refusals: list[str] = []
        self.down: dict[str, int] = {}

    def parcels(self, addressed: Iterable[tuple[int, Task]]) -> Iterator[Parcel]:
        """Encode each task, for its node, as its turn comes, and count its bytes."""
        wire = self._desk.config.wire.down
        encoder = TaskEncoder(wire, seed=self._desk.config.seed)
        for node, task in addressed:
            frame = encoder.encode(task)
            self.count(task, down=len(frame))
            yield Parcel(node=node, kind=self._kind, frame=frame)

    def receive(self, task: Task, reply: Reply) -> Update | None:
        """The good update in a reply, or None for one that is refused: not to be counted before it is accepted."""
        self.count(task, up=len(reply.frame))
        try:
            if reply.error:
                raise ValueError(reply.error)
            return self.open(task, reply.frame)
        except ValueError as error:
            self.refuse(task, str(error), size=len(reply.frame))
            return None

    def open(self, task: Task, frame: bytes) -> Update:
        """Decode and check one answer.

        Raises:
            ValueError: for a refusal, or an answer that does not hold against its task.
        """
        answer = decode_answer(frame, (Update, Refusal), limit=self._desk.largest_frame)
        if isinstance(answer, Refusal):
            check_refusal(answer, task)
            self._desk.roster.saw(task.device, version=answer.version)
            reason = answer.reason or NO_REASON
            raise ValueError(reason if reason.startswith(NOT_NOW) else f"the device declined: {reason}")
        check_update(answer, task, self._desk.roster.spec)
        return answer

    def accept(self, task: Task, update: Update, *, size: int) -> None:
        """A device that answered holds the version it was brought to, and the state it ended the round with.

        One that ran out of memory ended it with no state: what it holds is of the last round that it trained in.
        """
        roster, training = self._desk.roster, self._kind == Kind.TRAIN
        version = task.patch.version if task.patch else 0
        trained = training and not update.cost.out_of_memory
        roster.saw(task.device, version=version, trained_in=task.round if trained else None)
        if training:
            roster.did(task.device, good=True, round=task.round, patience=0, rest=0)
        self._tell(task, size=size, seconds=update.cost.seconds)

    def refuse(self, task: Task, problem: str, *, size: int = 0) -> None:
        """Log an answer that is not taken. Unless the device asks for patience it counts: too many, and it sits out."""
        desk, rules, problem = self._desk, self._desk.config.server, one_line(problem)
        self.refusals.append(f"{task.device}: {problem}")
        self._tell(task, size=size, refused=problem)
        if problem.startswith(NOT_NOW):
            log.info("round %d: %s: %s", task.round, task.device, problem)
            return
        desk.ledger.refused += 1
        log.warning("round %d: refused %s: %s", task.round, task.device, problem)
        if self._kind != Kind.TRAIN:
            return
        standing = desk.roster.did(
            task.device, good=False, round=task.round, patience=rules.quarantine_after, rest=rules.quarantine_rounds
        )
        if standing.until > task.round:
            log.warning("%s sits out up to round %d", task.device, standing.until)
            desk.watcher.rested(device=task.device, until=standing.until, reason=problem)

    def count(self, task: Task, *, up: int = 0, down: int = 0) -> None:
        """Bytes of frames that crossed the wire for a task."""
        if down:
            self.down[task.device] = down
        self._desk.ledger.count(task.device, up=up, down=down, evaluation=self._kind == Kind.EVALUATE)

    def let_off(self, task: Task) -> None:
        """Others were quick enough: the device is not waited for, and that is no failure."""
        down = self.down.get(task.device, 0)
        self._desk.watcher.unneeded(round=task.round, phase=self._kind, device=task.device, down=down)

    def _tell(self, task: Task, *, size: int, seconds: float = 0.0, refused: str = "") -> None:
        self._desk.watcher.answered(
            round=task.round,
            phase=self._kind,
            device=task.device,
            size=size,
            down=self.down.get(task.device, 0),
            seconds=seconds,
            refused=refused,
        )


class Collection:
    """Iterate over it once: the good updates, in the order of `tasks`.

    Attributes:
        seen: the updates handed on so far, without their tensors.
    """

    def __init__(
        self,
        desk: Desk,
        tasks: Sequence[Task],
        kind: Kind,
        *,
        journal: Journal | None = None,
        enough: int = 0,
        again: bool = False,
    ) -> None:
        """
        Args:
            journal: where good answers are kept until the round's checkpoint is written, and looked for first.
            enough: good answers that end the phase, reports of too little memory not among them; later ones are not
                waited for. 0 waits for all.
            again: this server has collected for this round before: what the journal has was counted then.
        """
        self._desk, self._tasks, self._kind, self._journal, self._enough = desk, tasks, kind, journal, enough
        self._again = again
        self._reception = Reception(desk, kind)
        self._round = tasks[0].round if tasks else 0
        self._by_node: dict[int, Task] = {}
        self._good: dict[str, Update | None] = {}  # None: it waits in the journal
        self._settled: set[str] = set()
        self._trained = 0  # good answers of devices that did not run out of memory
        self.seen: list[Update] = []

    @property
    def refusals(self) -> list[str]:
        """A line for each answer that was not taken."""
        return self._reception.refusals

    def __iter__(self) -> Iterator[Update]:
        rounds, devices = self._desk.config.server.rounds, [task.device for task in self._tasks]
        self._desk.watcher.began(round=self._round, rounds=rounds, phase=self._kind, devices=devices)
        for task in self._tasks:
            self._recall(task)
        for task in self._tasks:
            node = self._desk.roster.node(task.device)
            if task.device not in self._settled and node is None:
                self._settled.add(task.device)
                self._reception.refuse(task, "it is not connected")
            elif task.device not in self._settled and node is not None:
                self._by_node[node] = task
        parcels = self._reception.parcels(self._by_node.items())
        replies = self._desk.courier.exchange(parcels, str(self._round))
        for task in self._tasks:
            while task.device not in self._settled and not self._is_enough():
                self._take(next(replies))
            if task.device in self._good:
                update = self._fetch(task)
                self.seen.append(without_tensors(update))
                yield update
        replies.close()
        for task in self._tasks:
            if task.device not in self._settled:
                self._reception.let_off(task)

    def _is_enough(self) -> bool:
        return 0 < self._enough <= self._trained

    def _take(self, reply: Reply) -> None:
        """One answer; a good one is written down before it counts."""
        task = self._by_node[reply.node]
        self._settled.add(task.device)
        update = self._reception.receive(task, reply)
        if update is None:
            return
        if self._journal is not None:
            self._journal.put(task.device, Entry(down=self._reception.down[task.device], frame=reply.frame))
        self._keep(task, update, size=len(reply.frame))

    def _recall(self, task: Task) -> None:
        """Take what the journal has of an answer that was accepted before the server was cut."""
        entry = self._journal.get(task.device) if self._journal else None
        if entry is None:
            return
        try:
            update = self._reception.open(task, entry.frame)
        except ValueError as error:
            log.warning("round %d: the journal's answer of %s is not used: %s", self._round, task.device, error)
            return
        self._settled.add(task.device)
        up, down = (0, 0) if self._again else (len(entry.frame), entry.down)
        self._reception.count(task, up=up, down=down)
        self._keep(task, update, size=up)

    def _keep(self, task: Task, update: Update, *, size: int) -> None:
        self._good[task.device] = None if self._journal is not None else update
        self._trained += not update.cost.out_of_memory
        self._reception.accept(task, update, size=size)

    def _fetch(self, task: Task) -> Update:
        """A good update, from memory or from the journal."""
        update = self._good[task.device]
        if update is not None:
            self._good[task.device] = None
            return update
        entry = self._journal.get(task.device) if self._journal else None
        if entry is None:
            raise ValueError(f"the journal must keep the answer of {task.device} until the round is done, it is gone")
        return self._reception.open(task, entry.frame)


class TooFew(ValueError):  # noqa: N818 - what went wrong with a round, as one says it
    """A round got fewer good updates than the recipe's minimum."""


class Answers(Protocol):
    """What a phase has brought so far."""

    seen: list[Update]

    @property
    def refusals(self) -> list[str]: ...


def at_least(updates: Iterable[Update], answers: Answers, least: int) -> Iterator[Update]:
    """Pass updates on; raise TooFew at the end when they were fewer than `least`, so that the old state stands.

    A report of too little memory counts: were its round tried again, the same tasks would fail in the same way.
    """
    yield from updates
    if len(answers.seen) < least:
        first = f"; the first refusal: {answers.refusals[0]}" if answers.refusals else ""
        raise TooFew(f"a round needs at least {least} good updates, got {len(answers.seen)}{first}")
