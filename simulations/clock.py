"""A virtual clock for rounds of unequal devices: who is done when, and how long the others wait.

A device of a round receives, computes and sends, one after another: T_i = 8 down_i / link + seconds_i + 8 up_i / link.
The round is over with its last device, or with the first k of n (over-selection); T is that moment, and a device that
is done waits T - T_i. FedSpine's figure of merit is the idle time sum_i (T - T_i). Nothing here sleeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedloom.simulations.devices import Profile


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one device does in a round: bytes it receives, seconds it computes, bytes it sends."""

    down_bytes: float = 0.0
    compute_seconds: float = 0.0
    up_bytes: float = 0.0

    def __post_init__(self) -> None:
        for key in ("down_bytes", "compute_seconds", "up_bytes"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ValueError(f"{key} must be finite and >= 0, got {getattr(self, key)}")

    def seconds(self, device: Profile) -> float:
        """How long the device takes, from the round's start to the last byte it sends."""
        down, up = device.transfer(self.down_bytes, self.up_bytes)
        return down + self.compute_seconds + up


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round on the clock; times in seconds.

    finished: when each device is done, counted from `began`, whether the round waits for it or not.
    waited_for: the devices whose answers make the round, quickest first (by name where they tie).
    """

    began: float
    finished: Mapping[str, float]
    waited_for: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """How long the round takes: T."""
        return self.finished[self.waited_for[-1]]

    @property
    def ended(self) -> float:
        return self.began + self.seconds

    @property
    def idle(self) -> Mapping[str, float]:
        """T - T_i of each device that the round waited for."""
        return {name: self.seconds - self.finished[name] for name in self.waited_for}

    @property
    def idle_seconds(self) -> float:
        return sum(self.idle.values())


class Clock:
    """Virtual seconds since a run began, and what its rounds added up to. Rounds follow each other without a gap."""

    def __init__(self, now: float = 0.0) -> None:
        """`now`: where a run goes on from."""
        self.now, self.rounds, self.idle_seconds = now, 0, 0.0

    def round(self, times: Mapping[str, float], *, first: int = 0) -> Round:
        """Let one round pass.

        Args:
            times: T_i of each device in seconds (Load.seconds).
            first: end the round with so many answers, the quickest; 0 waits for all.

        Raises:
            ValueError: for a round of no devices, a time that is no finite number >= 0, or more answers than devices.
        """
        if not times:
            raise ValueError("a round must have at least one device, got none")
        if not 0 <= first <= len(times):
            raise ValueError(f"a round must wait for 1..{len(times)} devices, got {first}")
        for name, seconds in times.items():
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"the time of {name} must be finite and >= 0, got {seconds}")
        order = sorted(times, key=lambda name: (times[name], name))
        passed = Round(began=self.now, finished=dict(times), waited_for=tuple(order[: first or len(order)]))
        self.now, self.rounds, self.idle_seconds = (
            passed.ended,
            self.rounds + 1,
            self.idle_seconds + passed.idle_seconds,
        )
        return passed
