"""The agent's service over its Unix socket: raw messages of real calls, calls of nothing, and bytes that are no HTTP/2.

An input's first byte says what is done with the rest. Whatever it was, the agent must live, stay small, change nothing
on its disk but its logs, and give the next good call its answer.
"""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import corpus
import grpc
from agent_process import NAME
from agent_targets import _HEAD, _chunks, _mutate_chunks
from served import Served
from targets import Broken, Havoc, Target, same
from wire_targets import mutate_frame

from fedloom.client.agent.answers import KEPT
from fedloom.client.agent.calls import calling
from fedloom.client.agent.home import Home, socket_uri
from fedloom.client.chunks import CHUNK, cut
from fedloom.protocols import agent_pb2 as pb
from fedloom.protocols.codec import decode_answer, encode
from fedloom.protocols.messages import Hello, Refusal, Task, Update

SERVICE: Final = "/fedloom.agent.v1.Agent/"
METHODS: Final = ("Hello", "Perform", "Status", "Pause", "Resume", "Watch", "Nothing", "")
FRAME, CHUNKS, CALL, UNKNOWN, HALF, BYTES, LARGE = range(7)  # what an input is
_STATES: Final = ("idle", "train", "evaluate")
_SECONDS: Final = 30.0  # for an answer: much more than there is need for
_GOOD_EVERY: Final = 32  # inputs between two good tasks
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Socket:
    """An agent, and everything that can be done to its socket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "s"
        self._home = self._folder / "state"
        self._path = Home(folder=self._home).socket
        self._served: Served | None = None
        self._count = 0

    def seeds(self) -> list[bytes]:
        frames = [encode(task) for task in corpus.tasks()]
        chunked = [b"".join(_HEAD.pack(chunk.total, len(chunk.data)) + chunk.data for chunk in cut(f)) for f in frames]
        made = [bytes([FRAME]) + frame for frame in frames]
        made += [bytes([kind]) + chunks for kind in (CHUNKS, HALF) for chunks in chunked[:3]]
        made += [bytes([CALL, method]) + body for method in range(len(METHODS)) for body in (b"", b"\x0a\x01x")]
        made += [bytes([UNKNOWN]) + path for path in (b"grpc.health.v1.Health/Check", b"x" * 300, b"")]
        made += [bytes([BYTES]) + stream for stream in (_stream("Status", []), _stream("Perform", frames[:2]))]
        made += [bytes([BYTES]) + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes([BYTES]), bytes([LARGE]) + frames[0]]
        return made

    def check(self, data: bytes) -> None:
        """Refused means: an error of gRPC, a refusal in a frame, or bytes that got no answer."""
        served = self._open()
        kind, rest = (data[0] % 7, data[1:]) if data else (BYTES, b"")
        problem = ""
        try:
            self._do(kind, rest)
        except grpc.RpcError as error:
            problem = f"the agent says {error.code().name}"
            if error.code() == grpc.StatusCode.UNKNOWN:
                raise Broken(f"a call must not break down in the agent, got {error.details()[:200]!r}") from None
        except ValueError as error:
            problem = str(error)
        served.look()
        self._look()
        if problem:
            raise ValueError(problem)

    def mutate(self, data: bytes, rng: random.Random, havoc: Havoc) -> bytes:
        kind, rest = (data[0] % 7, data[1:]) if data else (FRAME, b"")
        if rng.random() < 0.05:
            kind = rng.randrange(7)
        if kind in (FRAME, LARGE):
            rest = mutate_frame(rest, rng, havoc, kind=Task) if rng.random() < 0.9 else havoc(rest)
        elif kind in (CHUNKS, HALF):
            rest = _mutate_chunks(rest, rng, havoc)
        else:
            rest = havoc(rest)
        return bytes([kind]) + rest

    def _open(self) -> Served:
        """Start the agent at the first input, and note what it answers."""
        if self._served is None:
            self._home.mkdir(parents=True)
            program = str(Path(__file__).with_name("agent_process.py"))
            self._served = Served([sys.executable, program, str(self._home)], self._folder / "agent.log")
            self._served.await_line()
            self._calls = calling(self._path)
            self._agent = self._calls.__enter__()
            options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
            self._channel: Any = grpc.insecure_channel(socket_uri(self._path), options=options)
            self._task = encode(corpus.tasks()[0])
            self._answer = self._agent.perform(self._task)
            self._files = self._digest()
        return self._served

    def _do(self, kind: int, rest: bytes) -> None:
        if kind == FRAME:
            self._judge(self._stream("Perform", (chunk.SerializeToString() for chunk in cut(rest))))
        elif kind == CHUNKS:
            self._judge(self._stream("Perform", (chunk.SerializeToString() for chunk in _chunks(rest))))
        elif kind == CALL:
            self._call(METHODS[rest[0] % len(METHODS)] if rest else "", rest[1:])
        elif kind == UNKNOWN:
            path = "".join(chr(33 + byte % 94) for byte in rest)
            self._channel.unary_unary("/" + path)(rest, timeout=_SECONDS)
        elif kind == HALF:
            self._half(rest)
        elif kind == BYTES:
            _pour(self._path, rest)
        else:
            self._judge(self._stream("Perform", iter([pb.Chunk(data=rest + bytes(2 * CHUNK)).SerializeToString()])))

    def _stream(self, method: str, messages: Iterator[bytes]) -> bytes:
        """What a call of a stream gives, its chunks put together."""
        answers = self._channel.stream_stream(SERVICE + method)(messages, timeout=_SECONDS)
        return b"".join(pb.Chunk.FromString(answer).data for answer in answers)

    def _judge(self, frame: bytes) -> None:
        """A task's answer is an update, or a refusal."""
        answer = decode_answer(frame, (Update, Refusal), limit=1 << 20)
        if isinstance(answer, Refusal):
            raise ValueError(answer.reason)

    def _call(self, method: str, message: bytes) -> None:
        """One message to any method, whether it takes one or many."""
        answers = self._channel.unary_stream(SERVICE + method)(message, timeout=_SECONDS)
        first = next(iter(answers), b"")
        answers.cancel()
        if method in ("Pause", "Resume"):
            same("a paused agent", pb.StatusReply.FromString(first).state == "paused", method == "Pause")
            self._agent.resume()
        elif method == "Hello":
            decode_answer(first and pb.Chunk.FromString(first).data, (Hello,), limit=1 << 20)
        elif method == "Perform":
            self._judge(pb.Chunk.FromString(first).data if first else b"")

    def _half(self, rest: bytes) -> None:
        """Some of a frame, then silence, and the caller is gone; the first half of its chunks."""
        chunks = [chunk.SerializeToString() for chunk in _chunks(rest)]
        gone = threading.Event()

        def some() -> Iterator[bytes]:
            yield from chunks[: len(chunks) // 2]
            gone.wait(_SECONDS)

        answers = self._channel.stream_stream(SERVICE + "Perform")(some(), timeout=_SECONDS)
        self._agent.status()  # by now the agent has what there is
        answers.cancel()
        gone.set()
        raise ValueError("half a frame")

    def _look(self) -> None:
        """The next good call is answered, and the disk is as it was."""
        self._count += 1
        try:
            status = self._agent.status(_SECONDS)
        except (ValueError, ConnectionError) as error:
            raise Broken(f"an agent must say how it is, got {error}") from None
        if status.device != NAME or status.state not in _STATES:
            raise Broken(f"an agent must be fit for work, got {status.device} {status.state}")
        if self._count % _GOOD_EVERY == 0:
            same("the answer to a good task", self._perform(), self._answer)
            same("files of the agent", self._digest(), self._files)
            if (kept := len(list((self._home / "answers").glob("[0-9a-f]*")))) > KEPT:
                raise Broken(f"an agent must keep {KEPT} answers at most, got {kept}")

    def _perform(self) -> bytes:
        """Where many came and went at once, one may have to wait for a place."""
        answer = b""
        for _ in range(200):
            try:
                answer = self._agent.perform(self._task)
                break
            except ValueError as error:
                if "resource_exhausted" not in str(error):
                    raise Broken(f"a good task must be answered, got {error}") from None
                threading.Event().wait(0.05)
        return answer

    def _digest(self) -> str:
        """What lies in the state folder beside logs, counters and kept answers."""
        digest = hashlib.sha256()
        for path in sorted(self._home.rglob("*")):
            own = path.name.startswith((".", "outbox", "traffic", "agent.")) or path.parent.name == "answers"
            if path.is_file() and not own:
                digest.update(f"{path.relative_to(self._home)}|".encode() + path.read_bytes())
        return digest.hexdigest()


def _pour(path: Path, data: bytes) -> None:
    """Bytes into a socket, and its end; what comes back within a moment must be no answer with data in it."""
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(_SECONDS)
        line.connect(str(path))
        try:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            back = b""
            line.settimeout(0.02)
            while part := line.recv(1 << 16):
                back += part
        except OSError:
            pass
    if _DATA not in _frames(back):
        raise ValueError("bytes that get no answer")


_DATA: Final = 0


def _frames(back: bytes) -> list[int]:
    """The types of the HTTP/2 frames that came."""
    kinds = []
    while len(back) >= 9:
        kinds.append(back[3])
        back = back[9 + int.from_bytes(back[:3], "big") :]
    return kinds


def _stream(method: str, frames: list[bytes]) -> bytes:
    """A whole call as a client would write it: the preface, settings, headers without an index, and messages."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": SERVICE + method,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    packed = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    messages = [pb.Chunk(data=frame, total=len(frame)).SerializeToString() for frame in frames] or [b""]
    body = b"".join(b"\0" + struct.pack(">I", len(message)) + message for message in messages)
    return _PREFACE + _frame(4, 0, 0, b"") + _frame(1, 4, 1, packed) + _frame(0, 1, 1, body)


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def targets(folder: Path) -> dict[str, Target]:
    """Files go into `folder`."""
    agent = Socket(folder)
    made = [
        Target(
            name="agent-socket", check=agent.check, seeds=agent.seeds, mutate=agent.mutate, seconds=5.0, memory=64 << 20
        )
    ]
    return {target.name: target for target in made}
