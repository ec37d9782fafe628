"""Times of day at which a device may work, such as 22:00-06:00, which wraps midnight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

_SPAN: Final = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]|24):([0-5]\d)")
_DAY: Final = 24 * 60


@dataclass(frozen=True, kw_only=True)
class Span:
    """From `start` up to `end`, minutes after local midnight; a span whose end is not after its start wraps."""

    start: int
    end: int

    def holds(self, minute: int) -> bool:
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


def parse_hours(hours: Iterable[str]) -> list[Span]:
    """The spans that `HH:MM-HH:MM` stand for; `24:00` may end one.

    Raises:
        ValueError: for anything else, and for a span of no length.
    """
    spans = []
    for text in hours:
        found = _SPAN.fullmatch(text.strip())
        parts = [int(part) for part in found.groups()] if found else [0, 0, 0, 0]
        start, end = parts[0] * 60 + parts[1], parts[2] * 60 + parts[3]
        if found is None or start == end or end > _DAY:
            raise ValueError(f"rules.hours must be spans such as '22:00-06:00', got {text!r}")
        spans.append(Span(start=start, end=end))
    return spans


def within(spans: Iterable[Span], now: datetime) -> bool:
    """Whether a local time lies in any of the spans; no spans hold all day."""
    chosen = list(spans)
    return not chosen or any(span.holds(now.hour * 60 + now.minute) for span in chosen)
