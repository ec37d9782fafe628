"""One task at a time: who comes while another runs waits, who brings the same task shares its answer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Final

from fedloom.client.agent.answers import Answer, Answers
from fedloom.client.agent.board import Board
from fedloom.client.agent.heading import Heading
from fedloom.client.agent.rules import Gate
from fedloom.client.agent.warm import STOPS, Refused, WarmModel
from fedloom.protocols.messages import NOT_NOW

log = logging.getLogger(__name__)

WAITING: Final = 4  # tasks that may wait; who brings one more is told to come again
_LOOK: Final = 0.5  # seconds between two looks at whether the one who waits is still there
PAUSED: Final = f"{NOT_NOW}this device is paused by its owner"


@dataclass(kw_only=True, eq=False)
class Job:
    """One task on its way to an answer. Its frame, which may be large, is held until the model's process has it."""

    digest: str
    heading: Heading
    frame: bytes = field(default=b"", repr=False)
    callers: int = 0
    over: Event = field(default_factory=Event)
    answer: Answer | None = None
    again: bool = False  # the answer was on the disk
    refused: Refused | None = None

    def take(self) -> bytes:
        """The frame, which the job then no longer holds."""
        frame, self.frame = self.frame, b""
        return frame


class Jobs:
    """The tasks of a device, from their frames to their answers."""

    def __init__(self, model: WarmModel, gate: Gate, answers: Answers, board: Board, paused: Path) -> None:
        """`paused` is the file that is there while the device is paused."""
        self._model, self._gate, self._answers, self._board, self._paused = model, gate, answers, board, paused
        self._change = Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._closing = False
        self._worker = Thread(target=self._work, name="jobs", daemon=True)

    def start(self) -> None:
        self._worker.start()

    def close(self) -> None:
        """Refuse what waits and let go of what runs."""
        with self._change:
            self._closing = True
            self._change.notify_all()

    @property
    def paused(self) -> bool:
        return self._paused.exists()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def pause(self) -> None:
        """Take no task and stop the one that runs, now and after a restart."""
        self._paused.touch(mode=0o600)
        self._board.touch()

    def resume(self) -> None:
        self._paused.unlink(missing_ok=True)
        self._board.touch()

    def submit(self, frame: bytes, heading: Heading) -> Job:
        """Queue a task, or join it if it is here already, or find its answer on the disk. Keep no frame after that.

        Raises:
            Refused: with the reason.
        """
        if self.paused:
            raise Refused(PAUSED)
        digest = self._answers.digest(frame, self._model.identity())
        kept = self._answers.get(digest)
        if kept is None:
            return self._take(digest, heading, frame)
        self._board.answered_again()
        job = Job(digest=digest, heading=heading, answer=kept, again=True)
        job.over.set()
        return job

    def answer(self, job: Job, there: Callable[[], bool]) -> Answer:
        """The answer to a task; blocks until it is there.

        `there` says whether the caller still waits; a task that nobody waits for gives way to the next.

        Raises:
            Refused: with the reason.
        """
        while not job.over.wait(_LOOK):
            if not there():
                self._leave(job)
                raise Refused("the one who brought the task has gone")
        if job.answer is None:
            raise job.refused or Refused(STOPS)
        return job.answer

    def _take(self, digest: str, heading: Heading, frame: bytes) -> Job:
        with self._change:
            known = [job for job in (self._running, *self._waiting) if job and job.digest == digest]
            if known and not known[0].over.is_set():
                known[0].callers += 1
                return known[0]
            if self._closing:
                raise Refused(STOPS)
            if len(self._waiting) >= WAITING:
                raise Refused(f"{NOT_NOW}this device is busy and {WAITING} tasks wait already")
            job = Job(digest=digest, heading=heading, frame=frame, callers=1)
            self._waiting.append(job)
            self._change.notify_all()
            return job

    def _leave(self, job: Job) -> None:
        with self._change:
            job.callers -= 1
            if not job.callers and job in self._waiting:
                self._waiting.remove(job)

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or bool(self._waiting))
                if self._closing:
                    for job in self._waiting:
                        job.over.set()
                    return
                job = self._running = self._waiting.pop(0)
            try:
                job.answer = self._do(job)
                self._board.ended()
            except Refused as refused:
                job.refused = refused
                self._board.ended(str(refused))
            except Exception as error:
                log.exception("a task failed")
                job.refused = Refused(f"this device's agent failed ({type(error).__name__})")
                self._board.ended(str(job.refused))
            with self._change:
                self._running = None
            job.over.set()

    def _do(self, job: Job) -> Answer:
        self._board.began(job.heading)
        if kept := self._answers.get(job.digest):
            return kept  # another caller's task, which ended while this one came
        reason = PAUSED if self.paused else self._gate.before(len(job.frame), own=(os.getpid(), self._model.pid))
        if reason:
            raise Refused(reason)
        answer = self._model.perform(job.take(), self._board.stepped, lambda: self._halt(job))
        try:
            self._answers.put(job.digest, answer)
        except OSError as error:
            log.warning("an answer could not be kept for later: %s", error)
        return answer

    def _halt(self, job: Job) -> str:
        """Why a task that runs must end; empty if it may go on."""
        if self.paused:
            return PAUSED
        if not job.callers and self._waiting:
            return "nobody waits for this task any more, and another has come"
        return self._gate.during()
