"""Being told what happens in a run, to show it or to write it down: the loop never waits for a watcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fedloom.protocols.messages import DeviceReport


class Watcher(Protocol):
    """Told what happens, in this order: started, then joined, began, answered, rested and ended as they come."""

    def started(self, *, run: str, name: str, strategy: str, round: int, rounds: int, devices: Sequence[str]) -> None:
        """`round` is the last finished one, -1 for none."""
        ...

    def joined(self, *, report: DeviceReport) -> None: ...

    def began(self, *, round: int, rounds: int, phase: str, devices: Sequence[str]) -> None: ...

    def answered(self, *, round: int, phase: str, device: str, size: int, seconds: float, refused: str) -> None:
        """`size` in bytes; `refused` is the reason, empty for a good answer."""
        ...

    def rested(self, *, device: str, until: int, reason: str) -> None:
        """A device that kept failing sits out up to and including round `until`."""
        ...

    def ended(self, *, record: Mapping[str, Any]) -> None: ...


class Silent:
    """A watcher that shows nothing; others say only what they want to know."""

    def started(self, *, run: str, name: str, strategy: str, round: int, rounds: int, devices: Sequence[str]) -> None:
        return

    def joined(self, *, report: DeviceReport) -> None:
        return

    def began(self, *, round: int, rounds: int, phase: str, devices: Sequence[str]) -> None:
        return

    def answered(self, *, round: int, phase: str, device: str, size: int, seconds: float, refused: str) -> None:
        return

    def rested(self, *, device: str, until: int, reason: str) -> None:
        return

    def ended(self, *, record: Mapping[str, Any]) -> None:
        return
