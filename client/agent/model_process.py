"""One life of the process that holds the model (worker.py), as its agent sees it: started, asked, stopped, gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, Final

from fedloom.client.agent.home import Home
from fedloom.client.agent.pipe import Pipe
from fedloom.client.settings import DeviceSettings

Said = tuple[dict[str, Any], bytes]

_LOG_LIMIT: Final = 2**20  # bytes; a longer log is set aside when a process starts


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What the process says when its model is there; or, with a reason, why it is not."""

    identity: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class ModelProcess:
    """A process from its start to its end. What it is asked, it answers in its own time, or its end answers for it."""

    def __init__(self, settings: DeviceSettings, home: Home) -> None:
        self._lock, self._pending, self._numbers = Lock(), dict[int, SimpleQueue[Said]](), 0
        self._ready, self.said_ready, self.over = Ready(reason="it ended while it loaded"), Event(), Event()
        self.cause = ""  # why the agent ended it, if the agent did
        ours, theirs = socket.socketpair()
        with theirs, _log(home.log) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedloom.client.agent.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt from the terminal is the agent's to handle
                env=_environment(settings),
            )
        self.pid = self._process.pid
        self._pipe = Pipe(ours.detach())
        told = json.loads(settings.model_dump_json(exclude={"ca", "key", "join", "server"}))
        self._send({"settings": told, "home": str(home.folder)})
        Thread(target=self._read, name="model-process", daemon=True).start()

    def ready(self, timeout: float | None = None) -> Ready | None:
        """How loading ended; None if it has not yet."""
        return self._ready if self.said_ready.wait(timeout) else None

    def ask(self, message: dict[str, Any], frame: bytes = b"") -> tuple[int, SimpleQueue[Said]]:
        """Ask something; its number, and where what is said about it arrives: at last `done`, `refused` or `died`."""
        said: SimpleQueue[Said] = SimpleQueue()
        with self._lock:
            self._numbers += 1
            number = self._numbers
            self._pending[number] = said
        if self.over.is_set():
            self._bury()
        self._send({**message, "number": number}, frame)
        return number, said

    def forget(self, number: int) -> None:
        """What is said about a number from now on is of no interest."""
        with self._lock:
            self._pending.pop(number, None)

    def stop(self, number: int) -> None:
        """Ask a task to end at its next step."""
        self._send({"ask": "stop", "number": number})

    def kill(self, cause: str) -> None:
        """End the process at once."""
        self.cause = self.cause or cause
        self._process.kill()

    def _send(self, message: dict[str, Any], frame: bytes = b"") -> None:
        with suppress(OSError):  # it is gone, and the reader will say so
            self._pipe.send(message, frame)

    def _read(self) -> None:
        try:
            while True:
                self._take(*self._pipe.receive())
        except (EOFError, OSError):
            pass
        self._process.wait()
        self.over.set()
        self.said_ready.set()
        self._bury()
        self._pipe.close()

    def _take(self, message: dict[str, Any], frame: bytes) -> None:
        if "number" not in message:
            self._loaded(message)
            return
        with self._lock:
            said = self._pending.get(message["number"])
        if said is not None:
            said.put((message, frame))

    def _loaded(self, message: dict[str, Any]) -> None:
        if message["say"] == "ready":
            self._ready = Ready(identity=message["identity"], about=message["about"])
        else:
            self._ready = Ready(reason=message["reason"])
        self.said_ready.set()

    def _bury(self) -> None:
        """Tell all that wait for an answer that none will come."""
        with self._lock:
            waiting, self._pending = list(self._pending.values()), {}
        for said in waiting:
            said.put(({"say": "died", "reason": self.cause or _last_words(self._process.returncode)}, b""))


def _last_words(code: int) -> str:
    if code < 0:
        return f"the model's process was killed (signal {-code}); perhaps this device ran out of memory"
    return f"the model's process ended (status {code}); its log says more"


def _environment(settings: DeviceSettings) -> dict[str, str]:
    threads = str(settings.rules.threads or os.cpu_count() or 1)
    return {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _log(path: Path) -> Any:
    if path.exists() and path.stat().st_size > _LOG_LIMIT:
        path.replace(path.with_suffix(".old.log"))
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb")
