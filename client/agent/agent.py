"""The resident agent of a device: it keeps the model warm, owns the data and the state, and answers on a Unix socket.

    fedloom client --config device.toml
      |- this process: socket, rules, queue, outbox                     (service.py, jobs.py, rules.py, outbox.py)
      |- a process that holds the model                                 (warm.py, worker.py)
      '- a SuperNode, whose ClientApp brings tasks to the socket         (supernode.py, relay.py)

Killed at any moment, it starts again where it was: every file of the state folder is written whole or not at all, and a
task that comes again is answered again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import grpc

from fedloom.client.agent.answers import Answers
from fedloom.client.agent.board import Board
from fedloom.client.agent.home import Home, socket_uri
from fedloom.client.agent.jobs import Jobs
from fedloom.client.agent.machine import resident_bytes
from fedloom.client.agent.outbox import Outbox
from fedloom.client.agent.rules import Gate
from fedloom.client.agent.service import CALLERS, WATCHERS, Service
from fedloom.client.agent.traffic import Traffic
from fedloom.client.agent.warm import WarmModel
from fedloom.client.chunks import CHUNK
from fedloom.client.settings import DeviceSettings
from fedloom.protocols.agent_pb2_grpc import add_AgentServicer_to_server

_QUICK = 8  # threads left for calls that are answered at once


class Agent:
    """One device's agent, in this process."""

    def __init__(self, settings: DeviceSettings, home: Home, link: Callable[[], dict[str, Any]] = dict) -> None:
        """
        Args:
            link: what the status says about the link to the server.

        Raises:
            ValueError: for rules that are none.
        """
        self._settings, self._home, self._link, self._since = settings, home, link, time.time()
        self.board = Board()
        self._traffic = Traffic(home.traffic)
        self._gate = Gate(settings.rules, home.folder, self._traffic)
        self._model = WarmModel(settings, home)
        self._jobs = Jobs(self._model, self._gate, Answers(home.answers), self.board, home.paused)
        self._server: Any = None
        self.about: dict[str, Any] = {}  # what the device says of itself, once its model is there

    def start(self) -> None:
        """Open the socket and load the model; returns when tasks can be done.

        Raises:
            ValueError: for a model or data that cannot be loaded, or a socket that cannot be opened.
        """
        self._open()
        self._jobs.start()
        self.about = self._model.start().about
        self.board.touch()

    def close(self) -> None:
        """Take no more calls, end what runs, and go."""
        self._jobs.close()
        self.board.close()
        self._model.close()
        if self._server is not None:
            self._server.stop(grace=1.0).wait()
        self._home.socket.unlink(missing_ok=True)

    def details(self) -> dict[str, Any]:
        """What the status says beside the task."""
        scene, rules = self.board.scene, self._settings.rules
        own = (os.getpid(), self._model.pid)
        return {
            "fedloom": version("fedloom"),
            "process": os.getpid(),
            "model_process": self._model.pid,
            "memory_mb": round(sum(resident_bytes(process) for process in own if process) / 1e6, 1),
            "since": self._since,
            "state_folder": str(self._home.folder),
            "model": self._settings.model.path,
            "device": self.about,
            "traffic": {**self._traffic.now(), "limit_mb": rules.max_traffic_mb},
            "rules": self._gate.during() or self._gate.sending(0),
            "tasks": {"answered": scene.done, "refused": scene.refused, "again": scene.again},
            "waiting": self._jobs.waiting,
            "link": self._link(),
        }

    def _open(self) -> None:
        service = Service(
            self._settings.name,
            limit=self._settings.limit,
            model=self._model,
            jobs=self._jobs,
            gate=self._gate,
            board=self.board,
            traffic=self._traffic,
            outbox=Outbox(self._home.folder),
            details=self.details,
        )
        threads = WATCHERS + CALLERS + _QUICK
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="agent"),
            options=[("grpc.max_receive_message_length", CHUNK + 4096)],
            maximum_concurrent_rpcs=threads,
        )
        add_AgentServicer_to_server(service, self._server)  # type: ignore[no-untyped-call]
        self._home.socket.unlink(missing_ok=True)  # of an agent that was killed: the lock says that none is alive
        mask = os.umask(0o177)
        try:
            self._server.add_insecure_port(socket_uri(self._home.socket))
        except RuntimeError as error:
            raise ValueError(f"the socket {self._home.socket} cannot be opened: {error}") from None
        finally:
            os.umask(mask)
        self._server.start()


@contextmanager
def running(settings: DeviceSettings, home: Home, link: Callable[[], dict[str, Any]] = dict) -> Iterator[Agent]:
    """The one agent of a state folder, ready for tasks, for as long as the block runs.

    Whatever is written meanwhile is for this user alone, whatever the umask was.

    Raises:
        ValueError: when another runs already, or this one cannot start.
    """
    home.open()
    mask = os.umask(0o077)
    try:
        with home.lock():
            home.tidy()
            agent = Agent(settings, home, link)
            try:
                agent.start()
                yield agent
            finally:
                agent.close()
    finally:
        os.umask(mask)
