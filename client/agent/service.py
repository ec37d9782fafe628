"""The agent's gRPC service: frames in and out, and what the agent is at. It owns no model and no data."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Semaphore, Timer
from typing import Any, Final

import grpc

from fedloom.client.agent.answers import Answer
from fedloom.client.agent.board import Board, Scene
from fedloom.client.agent.heading import Heading, read_heading
from fedloom.client.agent.jobs import PAUSED, Jobs
from fedloom.client.agent.outbox import Outbox
from fedloom.client.agent.rules import Gate
from fedloom.client.agent.traffic import Traffic
from fedloom.client.agent.warm import Refused, WarmModel
from fedloom.client.chunks import cut, gather
from fedloom.client.refusals import refusal_frame
from fedloom.protocols import agent_pb2 as pb
from fedloom.protocols.agent_pb2_grpc import AgentServicer
from fedloom.protocols.messages import NOT_NOW

log = logging.getLogger(__name__)

WATCHERS: Final = 8  # at most, so that they leave threads to others
CALLERS: Final = 8  # of Hello and Perform, at most
_ARRIVING: Final = 600.0  # seconds for a frame to come in whole
_STILL: Final = 10.0  # seconds without news after which a watcher is told how things are

Details = Callable[[], dict[str, Any]]


class Service(AgentServicer):
    """What callers of the agent's socket get.

    Args:
        name: the device's.
        limit: bytes of the longest frame that is taken in.
        details: what the status says beside the task.
    """

    def __init__(
        self,
        name: str,
        *,
        limit: int,
        model: WarmModel,
        jobs: Jobs,
        gate: Gate,
        board: Board,
        traffic: Traffic,
        outbox: Outbox,
        details: Details,
    ) -> None:
        self._name, self._limit, self._details = name, limit, details
        self._model, self._jobs, self._gate, self._board = model, jobs, gate, board
        self._traffic, self._outbox = traffic, outbox
        self._watchers, self._callers = Semaphore(WATCHERS), Semaphore(CALLERS)

    def Hello(self, request: pb.HelloRequest, context: Any) -> Iterator[pb.Chunk]:  # noqa: N802 - gRPC's name
        with _place(self._callers, context):
            try:
                if self._jobs.paused:
                    raise Refused(PAUSED)
                answer = self._model.hello()
                yield from self._send(answer, {"kind": "hello"}, context)
            except Refused as refused:
                yield from self._refuse(str(refused), None, context)

    def Perform(self, chunks: Iterator[pb.Chunk], context: Any) -> Iterator[pb.Chunk]:  # noqa: N802
        with _place(self._callers, context):
            heading: Heading | None = None
            try:
                frame = self._receive(chunks, context)
                problem = self._count(len(frame))
                heading = read_heading(frame, limit=self._limit)
                if problem:
                    raise Refused(problem)
                if heading.device != self._name:
                    raise ValueError(f"a task must be for device {self._name!r}, got one for {heading.device!r}")
                job = self._jobs.submit(frame, heading)
                del frame
                answer = self._jobs.answer(job, context.is_active)
                if reason := self._gate.sending(len(answer.frame)):
                    raise Refused(reason)
                yield from self._send(answer, _entry(heading) | {"again": job.again}, context)
            except ValueError as refused:
                yield from self._refuse(str(refused), heading, context, getattr(refused, "version", None))

    def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:  # noqa: N802
        return self._status()

    def Pause(self, request: pb.PauseRequest, context: Any) -> pb.StatusReply:  # noqa: N802
        self._jobs.pause()
        return self._status()

    def Resume(self, request: pb.ResumeRequest, context: Any) -> pb.StatusReply:  # noqa: N802
        self._jobs.resume()
        return self._status()

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Progress]:  # noqa: N802
        with _place(self._watchers, context):
            seen = -1
            while context.is_active():
                scene = self._board.after(seen, _STILL)
                if scene is None:
                    return
                seen = scene.number
                yield self._progress(scene)

    def _receive(self, chunks: Iterator[pb.Chunk], context: Any) -> bytes:
        """The frame that a caller sends; one that dawdles is cut off."""
        timer = Timer(_ARRIVING, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            return gather(chunks, limit=self._limit)
        finally:
            timer.cancel()

    def _count(self, size: int) -> str:
        """Count bytes that came; why the task must be refused where that fails, once it is known which task."""
        try:
            self._traffic.add(down=size)
        except OSError as error:
            return f"{NOT_NOW}this device's disk fails: {error.strerror}"
        return ""

    def _send(self, answer: Answer, entry: dict[str, Any], context: Any) -> Iterator[pb.Chunk]:
        """Log what leaves, count it, and let it go: in this order, and nothing goes when the log cannot be written."""
        digest = hashlib.sha256(answer.frame).hexdigest()
        try:
            self._outbox.note({**entry, "bytes": len(answer.frame), "digest": digest, "what": dict(answer.about)})
            self._traffic.add(up=len(answer.frame))
        except OSError as error:
            log.error(
                "%s must have room for the log of what leaves, got %s: make room, nothing leaves until then",
                self._outbox.folder,
                error.strerror,
            )
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the device cannot log what it sends: its disk fails")
        yield from cut(answer.frame)

    def _refuse(
        self, reason: str, heading: Heading | None, context: Any, version: int | None = None
    ) -> Iterator[pb.Chunk]:
        """Say no to the task of that heading, or to what is none."""
        asked: dict[str, Any] = {}
        if heading is not None:
            asked = {"run": heading.run, "round": heading.round, "nonce": heading.nonce}
            version = self._model.version(heading.run) if version is None else version
        frame = refusal_frame(reason, device=self._name, version=version or 0, **asked)
        about = {"refused": reason, "task": heading.kind.value if heading else ""}
        yield from self._send(Answer(frame=frame, about=about), _entry(heading) | {"kind": "refusal"}, context)

    def _status(self) -> pb.StatusReply:
        scene = self._board.scene
        return pb.StatusReply(
            device=self._name,
            state=self._state(scene),
            progress=self._progress(scene),
            last_error=self._model.failure or scene.outcome,
            details=json.dumps(self._details()),
        )

    def _progress(self, scene: Scene) -> pb.Progress:
        return pb.Progress(
            state=self._state(scene),
            kind=scene.kind,
            run=scene.run,
            round=scene.round,
            step=scene.step,
            of=scene.of,
            loss=scene.loss,
            seconds=scene.seconds,
        )

    def _state(self, scene: Scene) -> str:
        if self._model.failure:
            return "failed"
        if self._jobs.paused:
            return "paused"
        if self._model.loading:
            return "loading"
        return scene.kind if scene.busy else "idle"


def _entry(heading: Heading | None) -> dict[str, Any]:
    """What the log of what leaves says of a task."""
    return {"kind": heading.kind.value, "run": heading.run, "round": heading.round} if heading else {}


@contextmanager
def _place(places: Semaphore, context: Any) -> Iterator[None]:
    """A place among a bounded number of callers, for the block; who finds none is told so at once."""
    if not places.acquire(blocking=False):
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many callers at once")
    try:
        yield
    finally:
        places.release()
