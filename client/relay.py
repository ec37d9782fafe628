"""The ClientApp of a real device: it carries frames between Flower and the device's agent, and reads none.

Flower starts it anew for every message, so it must be quick to start: it loads no model, and neither torch nor whatever
needs it. The agent's socket comes from the node's configuration (`agent`), and so does the device's name (`name`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedloom.client.agent.calls import Away, Calls, calling

RECORD: Final = "fedloom"  # the one record of every message, with the codec's bytes under this key:
FRAME: Final = "frame"
PATIENCE: Final = 60.0  # seconds that an agent may take to come back: it may be loading its model
_PAUSES: Final = (0.1, 2.0)  # seconds between two tries: at first, and at most

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Ask the agent who it is."""
    return _reply(relayed(context, Calls.hello), message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Have the agent train."""
    return _perform(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Have the agent evaluate."""
    return _perform(message, context)


def _perform(message: Message, context: Context) -> Message:
    frame = _frame(message)
    return _reply(relayed(context, lambda agent: agent.perform(frame), task=frame), message)


def relayed(
    context: Context, call: Callable[[Calls], bytes], *, task: bytes = b"", patience: float = PATIENCE
) -> bytes:
    """What the agent answers; a Refusal, of `task` if there is one, when it stays away for `patience` seconds.

    A call that was cut short is made again: the agent gives the same task the same answer.
    """
    pause, most = _PAUSES
    until = time.monotonic() + patience
    while True:
        began = time.monotonic()
        try:
            with calling(Path(str(context.node_config["agent"]))) as agent:
                return call(agent)
        except Away as away:
            if time.monotonic() - began > patience:
                until = time.monotonic() + patience  # it was there, and worked
            if time.monotonic() >= until:
                return _refusal(context, str(away), task)
        time.sleep(pause)
        pause = min(2 * pause, most)


def _refusal(context: Context, reason: str, task: bytes) -> bytes:
    from fedloom.client.agent.heading import read_heading  # here, since most messages can do without NumPy's start
    from fedloom.client.refusals import refusal_frame

    asked: dict[str, Any] = {}
    with suppress(ValueError):  # what is no task has no heading
        heading = read_heading(task, limit=len(task))
        asked = {"run": heading.run, "round": heading.round, "nonce": heading.nonce}
    return refusal_frame(reason, device=str(context.node_config.get("name", "")), **asked)


def _frame(message: Message) -> bytes:
    record = message.content.get(RECORD)
    frame = record.get(FRAME) if isinstance(record, ConfigRecord) else None
    return frame if isinstance(frame, bytes) else b""  # the agent refuses what is no frame


def _reply(frame: bytes, message: Message) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({FRAME: frame})}), reply_to=message)
