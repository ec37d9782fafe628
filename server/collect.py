"""One phase of a round: its tasks out, its answers in, the good ones handed on in the order of the tasks.

Sums of floats depend on their order, and a run shall give the same bytes on every engine, whichever device was faster.
So an answer that comes early waits for those before it: in the journal where there is one, else in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedloom.protocols.codec import TaskEncoder, decode_answer
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import Kind, Refusal, Task, Update
from fedloom.server.courier import Courier, Parcel, Reply
from fedloom.server.intake import check_update, without_tensors
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


class Collection:
    """Iterate over it once: the good updates, in the order of `tasks`.

    Attributes:
        seen: the updates handed on so far, without their tensors.
        refusals: a line for each answer that was not taken.
    """

    def __init__(
        self, desk: Desk, tasks: Sequence[Task], kind: Kind, *, journal: Journal | None = None, enough: int = 0
    ) -> None:
        """
        Args:
            journal: where good answers are kept until the round's checkpoint is written, and looked for first.
            enough: good answers that end the phase; later ones are not waited for. 0 waits for all.
        """
        self._desk, self._tasks, self._kind, self._journal, self._enough = desk, tasks, kind, journal, enough
        self._round = tasks[0].round if tasks else 0
        self._by_node: dict[int, Task] = {}
        self._down: dict[str, int] = {}
        self._good: dict[str, Update | None] = {}  # None: it waits in the journal
        self._settled: set[str] = set()
        self.seen: list[Update] = []
        self.refusals: list[str] = []

    def __iter__(self) -> Iterator[Update]:
        rounds, devices = self._desk.config.server.rounds, [task.device for task in self._tasks]
        self._desk.watcher.began(round=self._round, rounds=rounds, phase=self._kind, devices=devices)
        for task in self._tasks:
            self._recall(task)
        for task in self._tasks:
            node = self._desk.roster.node(task.device)
            if task.device not in self._settled and node is None:
                self._refuse(task, "it is not connected")
            elif task.device not in self._settled and node is not None:
                self._by_node[node] = task
        replies = self._desk.courier.exchange(self._parcels(), str(self._round))
        for task in self._tasks:
            while task.device not in self._settled and not self._is_enough():
                self._take(next(replies))
            if task.device in self._good:
                update = self._fetch(task)
                self.seen.append(without_tensors(update))
                yield update
        replies.close()

    def _is_enough(self) -> bool:
        return 0 < self._enough <= len(self._good)

    def _parcels(self) -> Iterator[Parcel]:
        """Encode each task as its turn comes, and count its bytes."""
        config = self._desk.config
        encoder = TaskEncoder(config.wire.down, seed=config.seed)
        for node, task in self._by_node.items():
            frame = encoder.encode(task)
            self._down[task.device] = len(frame)
            self._count(task, down=len(frame))
            yield Parcel(node=node, kind=self._kind, frame=frame)

    def _take(self, reply: Reply) -> None:
        """Hold one answer against its task; write a good one down before it counts."""
        task = self._by_node[reply.node]
        self._count(task, up=len(reply.frame))
        try:
            if reply.error:
                raise ValueError(reply.error)
            update = self._open(reply.frame, task)
        except ValueError as error:
            self._refuse(task, str(error), size=len(reply.frame))
            return
        if self._journal is not None:
            self._journal.put(task.device, Entry(down=self._down[task.device], frame=reply.frame))
        self._accept(task, update, size=len(reply.frame))

    def _recall(self, task: Task) -> None:
        """Take what the journal has of an answer that was accepted before the server was cut."""
        entry = self._journal.get(task.device) if self._journal else None
        if entry is None:
            return
        try:
            update = self._open(entry.frame, task)
        except ValueError as error:
            log.warning("round %d: the journal's answer of %s is not used: %s", self._round, task.device, error)
            return
        self._count(task, up=len(entry.frame), down=entry.down)
        self._accept(task, update, size=len(entry.frame))

    def _open(self, frame: bytes, task: Task) -> Update:
        answer = decode_answer(frame, (Update, Refusal), limit=self._desk.config.wire.limit_mb * 2**20)
        if isinstance(answer, Refusal):
            self._desk.roster.saw(task.device, version=answer.version)
            raise ValueError(f"the device declined: {answer.reason}")
        check_update(answer, task, self._desk.roster.spec)
        return answer

    def _accept(self, task: Task, update: Update, *, size: int) -> None:
        """A device that answered holds the version it was brought to, and the state it ended the round with."""
        roster, training = self._desk.roster, self._kind == Kind.TRAIN
        self._settled.add(task.device)
        self._good[task.device] = None if self._journal is not None else update
        version = task.patch.version if task.patch else 0
        roster.saw(task.device, version=version, trained_in=task.round if training else None)
        if training:
            roster.did(task.device, good=True, round=self._round, patience=0, rest=0)
        self._tell(task, size=size, seconds=update.cost.seconds)

    def _refuse(self, task: Task, problem: str, *, size: int = 0) -> None:
        desk, rules = self._desk, self._desk.config.server
        self._settled.add(task.device)
        self.refusals.append(f"{task.device}: {problem}")
        desk.ledger.refused += 1
        log.warning("round %d: refused %s: %s", self._round, task.device, problem)
        self._tell(task, size=size, refused=problem)
        if self._kind != Kind.TRAIN:
            return
        standing = desk.roster.did(
            task.device, good=False, round=self._round, patience=rules.quarantine_after, rest=rules.quarantine_rounds
        )
        if standing.until > self._round:
            log.warning("%s sits out up to round %d", task.device, standing.until)
            desk.watcher.rested(device=task.device, until=standing.until, reason=problem)

    def _fetch(self, task: Task) -> Update:
        """A good update, from memory or from the journal."""
        update = self._good[task.device]
        if update is not None:
            self._good[task.device] = None
            return update
        entry = self._journal.get(task.device) if self._journal else None
        if entry is None:
            raise ValueError(f"the journal must keep the answer of {task.device} until the round is done, it is gone")
        return self._open(entry.frame, task)

    def _count(self, task: Task, *, up: int = 0, down: int = 0) -> None:
        self._desk.ledger.count(task.device, up=up, down=down, evaluation=self._kind == Kind.EVALUATE)

    def _tell(self, task: Task, *, size: int, seconds: float = 0.0, refused: str = "") -> None:
        self._desk.watcher.answered(
            round=self._round, phase=self._kind, device=task.device, size=size, seconds=seconds, refused=refused
        )
