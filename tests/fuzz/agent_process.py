"""An agent on its real socket, with everything but the model: a process of its own for socket_targets.py.

    python agent_process.py FOLDER      serves FOLDER/agent.sock and says `ready` when it does

Frames, chunks, headings, queue, outbox, traffic and kept answers are the real ones. In place of the process that holds
the model stands one that takes a task as that does, refuses what is none, and answers the rest at once.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import corpus

from fedloom.client.agent import agent as module
from fedloom.client.agent.answers import Answer
from fedloom.client.agent.home import Home
from fedloom.client.agent.model_process import Ready
from fedloom.client.agent.warm import Refused
from fedloom.client.settings import DeviceSettings
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import Task, Update

NAME: Final = "hospital-a"
LIMIT_MB: Final = 2


class StandIn:
    """What the agent's front asks of a WarmModel (warm.py), without a model."""

    pid, failure, loading = 0, "", False

    def __init__(self, settings: DeviceSettings, home: Home) -> None:
        self._limit = settings.limit

    def start(self) -> Ready:
        return Ready(identity=self.identity())

    def close(self) -> None:
        """There is nothing to end."""

    def identity(self) -> str:
        return "a stand-in"

    def version(self, run: str) -> int:
        return 0

    def hello(self) -> Answer:
        return Answer(frame=encode(corpus.hellos()[0]))

    def perform(self, frame: bytes, watch: Callable[[int, int, float], None], halt: Callable[[], str]) -> Answer:
        try:
            task = decode(frame, Task, limit=self._limit)
        except ValueError as error:
            raise Refused(str(error)) from None
        watch(1, 1, 0.5)
        update = Update(device=task.device, round=task.round, examples=1, run=task.run, nonce=task.nonce)
        return Answer(frame=encode(update), about={"examples": 1})


def main(folder: Path) -> None:
    """Serve until the one who started this ends it."""
    module.WarmModel = StandIn  # type: ignore[assignment, misc]
    settings: dict[str, Any] = {"name": NAME, "state": str(folder), "limit_mb": LIMIT_MB}
    home = Home(folder=folder)
    with module.running(DeviceSettings.model_validate(settings), home):
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
