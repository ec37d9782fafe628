"""The ClientApp: a relay between Flower's messages and a device. It reads no data and knows no model.

`open_device` finds the device that a message is for; in a simulation that is a pretend one, looked up by partition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedloom.client.refusals import refusal_frame
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import Hello, Task, Update

RECORD = "fedloom"  # the one record of every message, with the codec's bytes under this key:
FRAME = "frame"


class Handler(Protocol):
    """What the relay needs of a device."""

    name: str
    limit: int  # bytes; a larger frame is refused before it is read

    def hello(self) -> Hello: ...

    def handle(self, task: Task) -> Update: ...


def client_app(open_device: Callable[[Context], Handler]) -> ClientApp:
    """A ClientApp that hands every task to the device that `open_device` finds.

    What a device refuses (ValueError) goes back as a Refusal with its reason; anything else is a fault, and Flower
    reports it as one.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        try:
            return _reply(encode(open_device(context).hello()), message)
        except ValueError as error:
            return _reply(refusal_frame(str(error), device=""), message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _reply(_perform(open_device(context), message), message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _reply(_perform(open_device(context), message), message)

    return app


def _perform(device: Handler, message: Message) -> bytes:
    asked: dict[str, Any] = {}
    try:
        record = message.content.get(RECORD)
        frame = record.get(FRAME) if isinstance(record, ConfigRecord) else None
        if not isinstance(frame, bytes):
            raise ValueError(f"a task must come as bytes under {RECORD!r}/{FRAME!r}")
        task = decode(frame, Task, limit=device.limit)
        asked = {"run": task.run, "round": task.round, "nonce": task.nonce}
        return encode(device.handle(task), wire=task.wire, seed=task.seed)
    except ValueError as error:
        return refusal_frame(str(error), device=device.name, version=getattr(error, "version", 0), **asked)


def _reply(frame: bytes, message: Message) -> Message:
    return Message(RecordDict({RECORD: ConfigRecord({FRAME: frame})}), reply_to=message)
