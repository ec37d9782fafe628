"""What `fedloom server` says while it runs: a line for each thing that happens, and on a terminal what goes on now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from fedloom.server.units import human_bytes

LONGEST = 300  # characters of what a device or a stranger had written


class Narrator:
    """Prints lines and writes them to a log file too. On a terminal its last line moves."""

    def __init__(self, console: Console, log: Path, *, metric: str, bytes_before: tuple[int, int] = (0, 0)) -> None:
        """
        Args:
            metric: what the run is judged by, as its evaluation calls it.
            bytes_before: bytes up and down that the run has counted already.
        """
        self._console, self._metric, self._bytes = console, metric, bytes_before
        self._doing, self._asked, self._answers = "", 0, 0
        self._told: dict[str, str] = {}  # what was last said of a device, and of waiting
        self._status = Status("starting", console=console) if console.is_terminal else None
        self._log = logging.Logger("fedloom.server.log")
        self._handler = logging.FileHandler(log, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._log.addHandler(self._handler)

    def __enter__(self) -> Narrator:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()
        self._handler.close()

    def say(self, line: str, *, bad: bool = False) -> None:
        text = clean(line)
        self._log.log(logging.WARNING if bad else logging.INFO, text)
        self._console.print(f"[yellow]{escape(text)}[/]" if bad else escape(text), highlight=False, soft_wrap=True)

    def now(self, line: str) -> None:
        """What goes on at this moment, for the moving line."""
        if self._status is not None:
            self._status.update(escape(clean(line)))

    def waits(self, connected: int, needed: int) -> None:
        line = f"waiting for devices: {connected} of {needed} connected"
        self.now(line)
        if self._is_news("", line):
            self.say(line)

    def visit(self, visit: Mapping[str, Any]) -> None:
        who, address = str(visit.get("device") or "a device"), str(visit.get("address"))
        why = str(visit.get("why") or "")
        match visit.get("event"):
            case "refused":
                name = f" ({visit['device']})" if visit.get("device") else ""
                self.say(f"refused a connection from {address}{name}: {why}", bad=True)
            case "connected":
                self.say(f"{who} connected from {address}")
            case "left":
                self.say(f"{who} disconnected")
            case "waits":
                self.say(f"{who} waits at {address}: {why}", bad=True)
            case "sent back":
                self.say(f"{who} is told to connect again: {why}", bad=True)
            case "taken over":
                self.say(f"{who} is back at {address}: {why}")

    def event(self, event: Mapping[str, Any]) -> None:
        tell = getattr(self, f"_{event.get('event')}", None)
        if tell is not None:
            tell(event)

    def _is_news(self, about: str, line: str) -> bool:
        """Whether a line was not the last one said about this: after a restart devices join again as they were."""
        before, self._told[about] = self._told.get(about), line
        return before != line

    def _started(self, event: Mapping[str, Any]) -> None:
        devices, done = event["devices"], event["round"]
        begins = "begins" if done < 0 else f"goes on after round {done}"
        names = ", ".join(devices) if len(devices) <= 10 else ", ".join(devices[:10]) + ", ..."
        self.say(f"{event['name']} {begins} with {len(devices)} device{'s' * (len(devices) != 1)}: {names}")

    def _joined(self, event: Mapping[str, Any]) -> None:
        line = f"{event['device']} joined: rank {event['rank']}, {event['examples']} examples, {event['software']}"
        if self._is_news(event["device"], line):
            self.say(line)

    def _left_out(self, event: Mapping[str, Any]) -> None:
        line = f"{event['device']} is left out: {event['reason']}"
        if self._is_news(event["device"], line):  # it is asked again before every round
            self.say(line, bad=True)

    def _phase(self, event: Mapping[str, Any]) -> None:
        doing = {"train": "devices train", "evaluate": "devices evaluate", "hello": "devices say who they are"}
        self._answers, self._asked = 0, len(event["devices"])
        self._doing = f"round {event['round']}/{event['rounds']}: {doing.get(event['phase'], event['phase'])}"
        self.now(f"{self._doing}, 0 of {self._asked}")

    def _answer(self, event: Mapping[str, Any]) -> None:
        self._answers += 1
        self.now(f"{self._doing}, {self._answers} of {self._asked}")
        if event["refused"]:
            where = "" if event["phase"] == "hello" else f"round {event['round']}: "
            self.say(f"{where}{event['device']} is left out: {event['refused']}", bad=True)

    def _quarantined(self, event: Mapping[str, Any]) -> None:
        self.say(f"{event['device']} sits out up to round {event['until']}: {event['reason']}", bad=True)

    def _round(self, event: Mapping[str, Any]) -> None:
        record = event["record"]
        evaluation = record.get("evaluation") or {}
        told = []
        if self._metric in evaluation:
            told.append(f"{self._metric.replace('_', ' ')} {evaluation[self._metric]:.3f}")
        if "loss" in evaluation and self._metric != "loss":
            told.append(f"loss {evaluation['loss']:.3f}")
        if "updates" in record:
            told.append(f"{record['updates']} update{'s' * (record['updates'] != 1)}")
        up, down = record["bytes_up"] - self._bytes[0], record["bytes_down"] - self._bytes[1]
        self._bytes = (record["bytes_up"], record["bytes_down"])
        told += [f"{record['seconds']:.1f} s", f"{human_bytes(max(up, 0))} up, {human_bytes(max(down, 0))} down"]
        self.say(f"round {event['round']} done: {', '.join(told)}")


def clean(text: str) -> str:
    """One line of bounded length, without what could move a terminal's cursor."""
    line = "".join(sign if sign.isprintable() else "?" for sign in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
