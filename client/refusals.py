"""A device's 'no' as a frame: one bounded line of plain text, and the version that the device really holds."""

from __future__ import annotations

from typing import Final

from fedloom.protocols.codec import encode
from fedloom.protocols.messages import Refusal
from fedloom.protocols.validate import one_line

LONGEST_REASON: Final = 1000  # characters
NOT_NOW: Final = "not now: "  # begins the reasons that pass by themselves, or when the device's owner says so


def refusal_frame(reason: str, *, device: str, round: int = 0, version: int = 0) -> bytes:
    """A Refusal whose reason fits the wire."""
    line = one_line(reason)[:LONGEST_REASON]
    return encode(Refusal(device=device, round=round, reason=line, version=version))
