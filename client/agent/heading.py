"""What a task frame says about itself, read without its tensors: an agent's front needs no more, and little memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from fedloom.protocols import fedloom_pb2 as pb
from fedloom.protocols import validate
from fedloom.protocols.enums import KINDS, member
from fedloom.protocols.framing import unpack
from fedloom.protocols.messages import Kind

_TASK: Final = 1  # the kind of a frame that holds a task
_NAMES: Final = ("nothing", "Task", "Update", "Hello", "Refusal")


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A task's name: who is asked for what, in which round of which run, and the number that tells it from others."""

    device: str
    kind: Kind
    run: str
    round: int
    nonce: int


def read_heading(frame: bytes, *, limit: int) -> Heading:
    """The heading of a task frame of at most `limit` bytes. Its tensors are not looked at: decoding it may yet fail.

    Raises:
        ValueError: for anything but a whole frame with a task's record in it.
    """
    body, _ = unpack(frame, _TASK, _NAMES, limit=limit)
    record = pb.Task()
    try:
        record.ParseFromString(body)
    except DecodeError as error:
        raise ValueError(f"body of Task must be its protobuf record: {error}") from None
    run = record.run or record.run_hex.hex()
    validate.text("task.device", record.device)
    validate.text("task.run", run)
    validate.integer("task.round", record.round)
    kind = member(KINDS, record.kind, "task.kind")
    return Heading(device=record.device, kind=kind, run=run, round=record.round, nonce=record.nonce)
