"""The owner's rules, asked before a device works and while it does: hours, power, load, disk and traffic."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from fedloom.client.agent import machine
from fedloom.client.agent.hours import parse_hours, within
from fedloom.client.agent.traffic import Traffic
from fedloom.client.settings import Rules
from fedloom.protocols.messages import NOT_NOW

MB: Final = 10**6
_SPARE: Final = 16 * MB  # bytes of disk that are never used


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Where the rules look; a test may look elsewhere."""

    now: Callable[[], datetime] = datetime.now
    plugged_in: Callable[[], bool] = machine.plugged_in
    load_of_others: Callable[[Iterable[int]], float] = machine.load_of_others


class Gate:
    """Says whether the device may work now, and if not, why: a line for the server and for the owner's eyes."""

    def __init__(self, rules: Rules, state: Path, traffic: Traffic, probes: Probes | None = None) -> None:
        """
        Raises:
            ValueError: for hours that are none.
        """
        self._rules, self._state, self._traffic = rules, state, traffic
        self._spans, self._probes = parse_hours(rules.hours), probes or Probes()

    def before(self, incoming: int, own: Iterable[int] = ()) -> str:
        """Why a task of `incoming` bytes may not begin; empty if it may. May take a second, to look at the load.

        `own` are the processes whose load is the device's own.
        """
        return self.during() or self._disk(incoming) or self.sending(0) or self._load(own)

    def during(self) -> str:
        """Why work may not go on; empty if it may. Quick."""
        rules, probes = self._rules, self._probes
        if not within(self._spans, probes.now()):
            return f"{NOT_NOW}this device works at {', '.join(rules.hours)} (local time) only"
        if rules.plugged_in and not probes.plugged_in():
            return f"{NOT_NOW}this device works on mains power only"
        return ""

    def sending(self, size: int) -> str:
        """Why an answer of `size` bytes may not leave today; empty if it may."""
        limit, used = self._rules.max_traffic_mb, self._traffic.total()
        if limit and used + size > limit * MB:
            return f"{NOT_NOW}this device's traffic of a day must be <= {limit} MB, today's is {used / MB:.1f} MB"
        return ""

    def _disk(self, incoming: int) -> str:
        limit = self._rules.max_disk_mb
        if limit:
            used = machine.bytes_under(self._state)
            if used + incoming > limit * MB:
                return f"this device may keep {limit} MB on its disk, it holds {used / MB:.1f} MB"
        free = shutil.disk_usage(self._state).free
        if free < incoming + _SPARE:
            return f"{NOT_NOW}this device's disk is full, {free / MB:.0f} MB are free"
        return ""

    def _load(self, own: Iterable[int]) -> str:
        limit = self._rules.idle_cpu
        if limit < 1:
            load = self._probes.load_of_others(own)
            if load > limit:
                return f"{NOT_NOW}others use {load:.0%} of this device's processors, more than {limit:.0%}"
        return ""
