"""A device's 'no' as a frame: the task that it is about, one bounded line of plain text, and the version it holds."""

from __future__ import annotations

from typing import Final

from fedloom.protocols.codec import encode
from fedloom.protocols.messages import Refusal
from fedloom.protocols.validate import one_line

LONGEST_REASON: Final = 1000  # characters


def refusal_frame(
    reason: str, *, device: str, round: int = 0, run: str = "", nonce: int = 0, version: int = 0
) -> bytes:
    """A Refusal whose reason fits the wire; without round, run and nonce it is about no task."""
    line = one_line(reason)[:LONGEST_REASON]
    return encode(Refusal(device=device, round=round, reason=line, version=version, run=run, nonce=nonce))
