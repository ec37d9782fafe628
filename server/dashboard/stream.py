"""Server-sent events: a part's HTML whenever it changes; nothing is queued for a client that is slow to take it."""

from __future__ import annotations

import asyncio
import re
import time

from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from fedloom.server.dashboard.board import Board

HEARTBEAT, PATIENCE = 15.0, 20.0  # seconds between signs of life, and for a client to take what it is sent
RETRY = 3000  # milliseconds that a browser waits before it comes back
_LINE_END = re.compile(r"\r\n|\r|\n")


def event(name: str, data: str) -> str:
    """One event as it goes over the line."""
    return f"event: {name}\n" + "".join(f"data: {line}\n" for line in _LINE_END.split(data)) + "\n"


class Stream:
    """The ASGI endpoint; above `limit` clients at once a further one is sent away."""

    def __init__(self, board: Board, *, limit: int) -> None:
        self._board, self._limit = board, limit
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.open >= self._limit or self._board.closing:
            answer = PlainTextResponse("too many open pages\n", 503, {"Retry-After": "10"})
            await answer(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        self.open += 1
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            if scope["method"] != "HEAD":
                await self._tell(send, gone)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return  # it does not read: the connection is dropped
        finally:
            gone.cancel()
            self.open -= 1

    async def _tell(self, send: Send, gone: asyncio.Task[None]) -> None:
        """Send what is new, until the client goes or the server does."""
        sent = dict.fromkeys(self._board.parts, -1)
        text = f"retry: {RETRY}\n\n"
        while not (gone.done() or self._board.closing):
            change = self._board.change()
            text += event("clock", f"{time.time():.3f}")
            for name, (version, html) in self._board.parts.items():
                if version != sent[name]:
                    sent[name] = version
                    text += event(name, html)
            body = {"type": "http.response.body", "body": text.encode(), "more_body": True}
            await asyncio.wait_for(send(body), PATIENCE)
            text = ""
            wake = asyncio.create_task(change.wait())
            await asyncio.wait({wake, gone}, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
            wake.cancel()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
