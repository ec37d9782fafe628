"""The SuperLink with its door kept: devices reach the API that is for devices, and only with a key that is let in.

Flower 1.41 serves three APIs on one port. Two of them, Control (which starts runs of any code) and Runtime (which hands
out a ServerApp's tasks), take no password. So a connection from another machine gets the Fleet API and nothing else,
and one from this machine must show the run's password (protocols/password.py) for the other two. On the Fleet API a key
that is unknown or revoked is turned away before its request is read, no request may be larger than a message of the
run, and nobody answers in another's name. A device that starts again finds its place free: Flower would hold it for the
connection that was lost, for up to a minute.

    python -m fedloom.server.door SUPERLINK_ARGUMENTS    with FEDLOOM_DOOR naming the folder of door.json,
                                                         and FEDLOOM_PASSWORD
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from google.protobuf.message import DecodeError
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware

from fedloom.protocols.password import is_shown, own
from fedloom.server.guestbook import GuestList, Guests, VisitLog, key_digest, sent_key
from fedloom.server.presence import ANSWER, CONFIRM, ENTER, FLEET, LEAVE, OBJECT, POLL, Presence
from fedloom.server.settings import is_loopback

DOOR = "FEDLOOM_DOOR"
HEALTH = "/health"
KEY_HEADER = b"flwr-public-key"
PROTOBUF = b"application/protobuf"
SMALL = 2**16  # bytes of a request that only asks for entry
HELD = 412  # how Flower answers a device whose place is still held by another connection
OVER = 403  # how Flower answers what belongs to a run that is over
AHEAD, BEHIND = SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE  # s that a clock may be off

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Visitor:
    """Who asks: the key's PEM bytes and their digest, the device that it belongs to, and from where."""

    key: bytes
    digest: str
    device: str
    address: str


class Door:
    """Middleware around everything that Flower serves. It lives in the server's one event loop, so needs no lock."""

    def __init__(self, app: App, *, guests: GuestList, visits: VisitLog, password: str) -> None:
        self._app, self._guests, self._visits, self._password = app, guests, visits, password
        self._opened = time.monotonic()
        self._present: dict[str, Presence] = {}  # by digest of a key that is let in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, address = str(scope.get("path")), (scope.get("client") or ("", 0))[0]
        if scope["type"] == "http" and path.startswith(FLEET):
            await self._fleet(scope, receive, send, address)
        elif scope["type"] == "lifespan" or (scope["type"], path) == ("http", HEALTH):
            await self._app(scope, receive, send)
        elif not _is_local(scope):
            self._visits("refused", address=address, why=f"{path[:80]} is for this machine alone")
            await _refuse(scope, send, 403, "not for devices")
        elif not is_shown(scope["headers"], self._password):
            self._visits("refused", address=address, why=f"{path[:80]} is for this run's own processes alone")
            await _refuse(scope, send, 401, "not without the run's password")
        else:
            await self._app(scope, receive, send)

    async def _fleet(self, scope: Scope, receive: Receive, send: Send, address: str) -> None:
        """Let a known key's request pass; an unknown one's is not read."""
        guests, headers, path = self._guests(), dict(scope["headers"]), scope["path"]
        key = sent_key(headers.get(KEY_HEADER, b""))
        who = Visitor(key=key, digest=key_digest(key), address=address, device=_name(guests, key))
        problem = _problem(guests, who)
        if problem:
            self._visits("refused", device=who.device, address=address, why=problem)
            if path != ENTER:  # there Flower refuses by itself, with the code that a SuperNode understands
                await _refuse(scope, send, 401, problem)
                return
        meter = Meter(receive, send, limit=SMALL if path == ENTER else guests.limit)
        if meter.is_past(headers.get(b"content-length", b"0")):
            await _refuse(scope, send, 413, "too large")
        elif problem:
            await self._app(scope, meter.receive, meter.send)
        else:
            await self._serve(scope, meter, who)
        if meter.over:
            self._visits("refused", device=who.device, address=address, why=f"it sent more than {meter.limit} bytes")

    async def _serve(self, scope: Scope, meter: Meter, who: Visitor) -> None:
        """A request of a device that is let in."""
        path, device = scope["path"], self._present.setdefault(who.digest, Presence(self._opened))
        if path == POLL and device.owes:
            await self._send_back(scope, meter, who)
            return
        device.inside += 1
        try:
            if path == ENTER:
                await self._enter(scope, meter, who, device)
            elif path in (OBJECT, CONFIRM):
                await self._message(scope, meter, who, confirmed=path == CONFIRM)
            elif path == ANSWER:
                await self._answer(scope, meter, who)
            else:
                await self._app(scope, meter.receive, meter.send)
        finally:
            device.inside -= 1
        device.heard(path, meter.status, meter.sent)
        if meter.status == 401 and (wrong := clock_problem(dict(scope["headers"]), time.time())):
            self._visits("refused", device=who.device, address=who.address, why=wrong, alike="clock")
        if path in (ENTER, LEAVE) and 0 < meter.status < 400:
            self._visits("connected" if path == ENTER else "left", device=who.device, address=who.address)

    async def _enter(self, scope: Scope, meter: Meter, who: Visitor, device: Presence) -> None:
        """Let a known device in. Where Flower would send it away for good, it is told to try again shortly.

        That is so while its key is being registered, and while its place is held by a connection that was lost; the
        place is freed then, for long enough that whoever waits for an answer from there learns of the loss.
        """
        if device.is_kept_free():
            await _refuse(scope, meter.send, 503, "wait a moment")
            return
        status, answer = await self._kept(scope, meter)
        if status == HELD:
            await self._free(scope, who, device)
            await _refuse(scope, meter.send, 503, "wait a moment")
            return
        for message in answer:
            await meter.send(message)

    async def _free(self, scope: Scope, who: Visitor, device: Presence) -> None:
        """Free a device's place if nobody is there any more. Flower has checked that the key is the device's own."""
        state = scope["app"].state.linkstate_factory.state()
        node = await run_in_threadpool(state.get_node_id_by_public_key, who.key)
        if node is None:
            return  # not registered yet
        device.inside -= 1  # this request is not one of the connection that was lost
        gone = device.is_gone()
        device.inside += 1
        if not gone:
            self._visits("waits", device=who.device, address=who.address, why="it has another connection, still in use")
        elif await run_in_threadpool(state.deactivate_node, node):
            device.free()
            self._visits("taken over", device=who.device, address=who.address, why="its last connection was lost")

    async def _send_back(self, scope: Scope, meter: Meter, who: Visitor) -> None:
        """Have a SuperNode end, so that its device starts it afresh."""
        self._visits("sent back", device=who.device, address=who.address, why="it lost count of its messages")
        await _refuse(scope, meter.send, 401, "connect again")

    async def _message(self, scope: Scope, meter: Meter, who: Visitor, *, confirmed: bool) -> None:
        """Hand out a part of a message, or take its receipt; when its run has ended meanwhile, a SuperNode loses count.

        With the whole message there, the receipt is taken all the same: the SuperNode works for nothing at most once,
        and what it worked out may be what the next run asks for. With parts missing it has to start afresh.
        """
        status, answer = await self._kept(scope, meter)
        if status == OVER and confirmed:
            await meter.send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", PROTOBUF)]})
            await meter.send({"type": "http.response.body", "body": b""})
        elif status == OVER:
            await self._send_back(scope, meter, who)
        else:
            for message in answer:
                await meter.send(message)

    async def _answer(self, scope: Scope, meter: Meter, who: Visitor) -> None:
        """Pass an answer on if it is the device's own. Flower checks who asks, and not in whose name the answer is."""
        body = bytearray()
        while True:
            message = await meter.receive()
            if message["type"] != "http.request":
                await _refuse(scope, meter.send, 413, "too large")  # or it broke off, and hears nothing
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        if not _is_own(bytes(body)):
            self._visits("refused", device=who.device, address=who.address, why="it answers in another device's name")
            await _refuse(scope, meter.send, 403, "not in another's name")
            return
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await meter.receive()

        await self._app(scope, again, meter.send)

    async def _kept(self, scope: Scope, meter: Meter) -> tuple[int, list[Message]]:
        """Flower's answer, kept back: its status and its messages."""
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        await self._app(scope, meter.receive, keep)
        return next((int(message["status"]) for message in answer if "status" in message), 0), answer


class Meter:
    """Counts what one request sends, and notes how it was answered.

    Attributes:
        status: of the answer; 0 before there is one.
        sent: bytes of its body.
        over: whether the request went past the limit.
    """

    def __init__(self, receive: Receive, send: Send, *, limit: int) -> None:
        self._receive, self._send, self._left = receive, send, limit
        self.limit, self.status, self.sent, self.over = limit, 0, 0, False

    def is_past(self, length: bytes) -> bool:
        """Whether the length that a request tells is past the limit, or no length."""
        self.over = not length.isdigit() or len(length) > 18 or int(length) > self.limit
        return self.over

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.over = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.sent += len(message.get("body", b""))
        await self._send(message)


def _name(guests: Guests, key: bytes) -> str:
    """The device behind a key; empty for one that nobody gave a name."""
    digest = key_digest(key)
    return (guests.known or {}).get(digest, "") or guests.revoked.get(digest, "")


def _problem(guests: Guests, who: Visitor) -> str:
    """Why a key is not let in; empty when it is."""
    if guests.known is None or who.digest in guests.known:
        return ""
    if who.digest in guests.revoked:
        return "its key is revoked"
    return f"its key is unknown ({who.digest[:12]})" if who.key else "it shows no key"


def _is_own(body: bytes) -> bool:
    """Whether every message of a push comes from the node that pushes it, whose key Flower then checks."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return True  # Flower says so itself
    return all(message.metadata.src_node_id == request.node.node_id for message in request.messages_list)


def clock_problem(headers: Mapping[bytes, bytes], now: float) -> str:
    """What is wrong with the clock behind a signed request; empty if nothing. `now` is this machine's (Unix seconds).

    Flower answers a request from another time as it answers one that is not signed.
    """
    try:
        signed = datetime.fromisoformat(headers.get(TIMESTAMP_HEADER.encode(), b"").decode("ascii"))
        ahead = signed.timestamp() - now
    except (ValueError, OverflowError, OSError):
        return ""
    return "" if -BEHIND < ahead < AHEAD else f"its clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"


def _is_local(scope: Scope) -> bool:
    """Whether a connection comes from this machine: from a loopback address, or from the address that it came to."""
    client, server = scope.get("client"), scope.get("server")
    return client is not None and (is_loopback(client[0]) or (server is not None and client[0] == server[0]))


async def _refuse(scope: Scope, send: Send, status: int, why: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": why}).encode()})


def main() -> None:
    """Flower's SuperLink behind the door."""
    folder = Path(os.environ[DOOR])
    door = Middleware(Door, guests=GuestList(folder), visits=VisitLog(folder), password=own())
    extensions.get_middleware = lambda: (door,)
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
