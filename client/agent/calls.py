"""Calls to a device's agent, for the relay and the command line: no model, no data, and a short start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from fedloom.client.agent.home import socket_uri
from fedloom.client.chunks import CHUNK, cut, gather
from fedloom.protocols import agent_pb2 as pb
from fedloom.protocols.agent_pb2_grpc import AgentStub

_LARGEST: Final = 2**40  # bytes of an answer; the agent is trusted, and the server has a limit of its own


class Away(ConnectionError):  # noqa: N818 - where the agent is, rather than what went wrong
    """There is no agent at the socket, or it has gone in the middle of a call."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a task is."""

    state: str
    kind: str
    run: str
    round: int
    step: int
    of: int
    loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the agent is at."""

    device: str
    state: str
    progress: Progress
    last_error: str
    details: dict[str, Any]


class Calls:
    """An open line to an agent.

    Each call raises Away when the agent is not there, and ValueError when it says no to the call itself.
    """

    def __init__(self, channel: Any) -> None:
        self._stub: Any = AgentStub(channel)  # type: ignore[no-untyped-call]

    def hello(self) -> bytes:
        """The device's hello or refusal, as a frame."""
        with _errors():
            return gather(self._stub.Hello(pb.HelloRequest()), limit=_LARGEST)

    def perform(self, frame: bytes) -> bytes:
        """The answer to a task frame, however long it takes."""
        with _errors():
            return gather(self._stub.Perform(cut(frame)), limit=_LARGEST)

    def status(self, timeout: float = 10.0) -> Status:
        with _errors():
            return _status(self._stub.Status(pb.StatusRequest(), timeout=timeout))

    def pause(self, timeout: float = 10.0) -> Status:
        with _errors():
            return _status(self._stub.Pause(pb.PauseRequest(), timeout=timeout))

    def resume(self, timeout: float = 10.0) -> Status:
        with _errors():
            return _status(self._stub.Resume(pb.ResumeRequest(), timeout=timeout))

    def watch(self) -> Iterator[Progress]:
        """Every change, until the agent goes."""
        with _errors():
            for progress in self._stub.Watch(pb.WatchRequest()):
                yield _progress(progress)


@contextmanager
def calling(socket: Path) -> Iterator[Calls]:
    """A line to the agent at a socket; nothing is sent before the first call."""
    options = [
        ("grpc.max_receive_message_length", CHUNK + 4096),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),  # an earlier line that failed makes this one wait for nothing
    ]
    with grpc.insecure_channel(socket_uri(socket), options=options) as channel:
        yield Calls(channel)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        code, said = error.code(), error.details()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            raise Away(f"the device's agent is not there: {said}") from None
        raise ValueError(f"the device's agent says {code.name.lower()}: {said}") from None


def _status(reply: pb.StatusReply) -> Status:
    return Status(
        device=reply.device,
        state=reply.state,
        progress=_progress(reply.progress),
        last_error=reply.last_error,
        details=json.loads(reply.details),
    )


def _progress(message: pb.Progress) -> Progress:
    names = ("state", "kind", "run", "round", "step", "of", "loss", "seconds")
    return Progress(**{name: getattr(message, name) for name in names})
