"""The dashboard's addresses: the page, its events, figures for Prometheus, and health."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fedloom.server.dashboard.board import Board
from fedloom.server.dashboard.exposition import CONTENT_TYPE
from fedloom.server.dashboard.guard import Guard
from fedloom.server.dashboard.page import TEMPLATES
from fedloom.server.dashboard.stream import Stream

STREAMS = 32  # pages that can be open at once
STATIC = {"dashboard.css": "text/css", "dashboard.js": "text/javascript", "icon.svg": "image/svg+xml"}


def build_app(board: Board, *, bound: str, names: Sequence[str] = (), streams: int = STREAMS) -> Starlette:
    """The application for one board.

    Args:
        bound: the host it listens on.
        names: other host names that it may be asked by.
        streams: how many pages may be open at once.
    """

    def page(request: Request) -> Response:
        return HTMLResponse(board.document())

    def metrics(request: Request) -> Response:
        return Response(board.metrics(), media_type=CONTENT_TYPE)

    def healthz(request: Request) -> Response:
        well, facts = board.health()
        return JSONResponse(facts, status_code=200 if well else 503)

    def static(name: str, request: Request) -> Response:
        return Response((TEMPLATES / name).read_bytes(), media_type=STATIC[name])

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await board.catch_up()
        keeper = asyncio.create_task(board.keep())
        yield
        board.close()
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper

    routes = [
        Route("/", page),
        Route("/metrics", metrics),
        Route("/healthz", healthz),
        Route("/events", Stream(board, limit=streams)),
        *(Route(f"/{name}", partial(static, name)) for name in STATIC),
    ]
    return Starlette(routes=routes, lifespan=lifespan, middleware=[Middleware(Guard, bound=bound, names=names)])
