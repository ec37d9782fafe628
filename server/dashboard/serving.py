"""The dashboard as a thread of the server's process: start it, stop it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import uvicorn

from fedloom.server.dashboard.app import STREAMS, build_app
from fedloom.server.dashboard.board import PERIOD, Board

log = logging.getLogger("fedloom.server.dashboard")

CONNECTIONS = 96  # beside open pages: what else may be asked for at once
HEADER_LIMIT = 16 * 1024  # bytes
START, STOP = 15.0, 10.0  # seconds


class Dashboard:
    """Serves the page of one run's folder; it only reads there, and the folder may still be empty."""

    def __init__(
        self,
        out: Path,
        host: str = "127.0.0.1",
        port: int = 8080,
        *,
        names: Sequence[str] = (),
        streams: int = STREAMS,
        period: float = PERIOD,
    ) -> None:
        """
        Args:
            out: the run's folder.
            host: the address to listen on.
            port: the port; 0 takes a free one.
            names: host names that it may be asked by, beside localhost and addresses.
            streams: how many pages may be open at once.
            period: seconds between looks at the folder.
        """
        self._out, self._host, self._port = out, host, port
        self._names, self._streams, self._period = tuple(names), streams, period
        self._thread: threading.Thread | None = None
        self.url = ""

    def start(self) -> None:
        """Listen, and return once it answers.

        Raises:
            ValueError: when the address cannot be listened on, or it does not come up.
        """
        if self._thread is not None:
            raise ValueError(f"a dashboard starts once until it is stopped, it serves {self.url}")
        listener = _listen(self._host, self._port)
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{listener.getsockname()[1]}/"
        self._up, self._failure = threading.Event(), ""
        self._thread = threading.Thread(target=self._run, args=(listener,), name="fedloom-dashboard", daemon=True)
        self._thread.start()
        if not self._up.wait(START) or self._failure:
            self.stop()
            raise ValueError(f"the dashboard must come up within {START:g} s, got {self._failure or 'no answer'}")

    def stop(self) -> None:
        """End open pages, then the thread; nothing happens where it does not run."""
        if self._thread is None:
            return
        with contextlib.suppress(AttributeError, RuntimeError):  # it never came up, or its loop is closed already
            self._loop.call_soon_threadsafe(self._end)
        self._thread.join(STOP)
        self._thread = None

    def _end(self) -> None:
        self._board.close()
        self._server.should_exit = True

    def _run(self, listener: socket.socket) -> None:
        try:
            asyncio.run(self._serve(listener))
        except Exception as error:
            log.exception("the dashboard has ended")
            self._failure = str(error)
        finally:
            listener.close()
            self._up.set()

    async def _serve(self, listener: socket.socket) -> None:
        self._loop, self._board = asyncio.get_running_loop(), Board(self._out, period=self._period)
        app = build_app(self._board, bound=self._host, names=self._names, streams=self._streams)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=self._streams + CONNECTIONS,
            h11_max_incomplete_event_size=HEADER_LIMIT,
            timeout_graceful_shutdown=3,
        )
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not (self._server.started or serving.done()):
            await asyncio.sleep(0.01)
        self._up.set()
        await serving

    def __enter__(self) -> Dashboard:
        if self._thread is None:
            self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def serve(out: Path, host: str = "127.0.0.1", port: int = 8080, *, names: Sequence[str] = ()) -> Dashboard:
    """A running dashboard of a run's folder; its `url` says where, `stop()` ends it.

    Raises:
        ValueError: when the address cannot be listened on.
    """
    dashboard = Dashboard(out, host, port, names=names)
    dashboard.start()
    return dashboard


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"the dashboard's address {host}:{port} must be free to listen on, got: {reason}") from None
    return listener
