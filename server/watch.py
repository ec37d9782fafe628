"""Being told what happens in a run, to show it or to write it down: the loop never waits for a watcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fedloom.protocols.messages import DeviceReport


class Watcher(Protocol):
    """Told what happens: devices greeted, joined or left out, then started, then the rounds as they come."""

    def started(self, *, run: str, name: str, strategy: str, round: int, rounds: int, devices: Sequence[str]) -> None:
        """`round` is the last finished one, -1 for none."""
        ...

    def joined(self, *, report: DeviceReport) -> None: ...

    def began(self, *, round: int, rounds: int, phase: str, devices: Sequence[str]) -> None: ...

    def left_out(self, *, device: str, reason: str) -> None:
        """A device that said hello cannot take part."""
        ...

    def answered(
        self, *, round: int, phase: str, device: str, size: int, down: int, seconds: float, refused: str
    ) -> None:
        """One answer, or the lack of one.

        Args:
            size: its bytes.
            down: bytes of the task that it answers.
            refused: the reason why it is not taken, empty for a good one; it begins with NOT_NOW where the device asks
                for patience.
        """
        ...

    def unneeded(self, *, round: int, phase: str, device: str, down: int) -> None:
        """Others were quick enough: a device that was asked, by `down` bytes, is not waited for."""
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

    def left_out(self, *, device: str, reason: str) -> None:
        return

    def answered(
        self, *, round: int, phase: str, device: str, size: int, down: int, seconds: float, refused: str
    ) -> None:
        return

    def unneeded(self, *, round: int, phase: str, device: str, down: int) -> None:
        return

    def rested(self, *, device: str, until: int, reason: str) -> None:
        return

    def ended(self, *, record: Mapping[str, Any]) -> None:
        return
