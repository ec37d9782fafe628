"""Bad weather for the round loop: pretend devices that are slow, silent, away or wrong, and servers that crash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedloom.protocols.config import RunConfig, build_config, override
from fedloom.server.app import Plan, coordinate
from fedloom.server.watch import Silent
from fedloom.simulations.grid import InProcessGrid, pretend_nodes
from fedloom.simulations.world import pretend_app

DEVICES = 5
Bend = Callable[[str, int, bytes], bytes]  # kind of message, node, the answer's frame; what arrives of it


class Weather(InProcessGrid):
    """Pretend devices by node, 1 to 5, of which some are slow (their answers come last), silent, away or garbled."""

    def __init__(self, config: RunConfig, work: Path) -> None:
        super().__init__(pretend_nodes(DEVICES), pretend_app, (config, work))
        self.slow: set[int] = set()
        self.silent: set[int] = set()
        self.away: set[int] = set()
        self.garbled: set[int] = set()
        self.bend: Bend = lambda kind, node, frame: frame
        self.asked: list[tuple[str, int]] = []
        self.sent: dict[tuple[str, int], list[bytes]] = {}  # frames to each node
        self._held: dict[str, Message] = {}
        self._target: dict[str, int] = {}

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if node not in self.away]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        some = list(messages)
        ids = list(super().push_messages(some))
        for id_, message in zip(ids, some, strict=True):
            asked = (message.metadata.message_type, message.metadata.dst_node_id)
            self.asked.append(asked)
            self.sent.setdefault(asked, []).append(message.content["fedloom"]["frame"])  # type: ignore[arg-type]
            self._target[id_] = message.metadata.dst_node_id
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        while found := list(super().pull_messages(list(self._target))):
            self._held |= {message.metadata.reply_to_message_id: message for message in found}
        ready = [id_ for id_ in ids if id_ in self._held and self._target[id_] not in self.silent]
        quick = [id_ for id_ in ready if self._target[id_] not in self.slow]
        return [self._answer(id_) for id_ in (quick or ready)[::-1]]

    def _answer(self, id_: str) -> Message:
        message, node = self._held.pop(id_), self._target[id_]
        frame = self.bend(message.metadata.message_type, node, bytes(message.content["fedloom"]["frame"]))
        if node in self.garbled:
            frame = frame[:40] + bytes([frame[40] ^ 1]) + frame[41:]
        message.content = RecordDict({"fedloom": ConfigRecord({"frame": frame})})
        return message


class CrashError(Exception):
    """A pretend crash."""


class CrashAt(Silent):
    """Dies at the n-th answer of a phase."""

    def __init__(self, round: int, phase: str, answers: int) -> None:
        self._at, self._left = (round, phase), answers

    def answered(self, **about: Any) -> None:
        self._left -= (about["round"], about["phase"]) == self._at
        if self._left == 0:
            raise CrashError


def write_table(tiny_llama: Path, folder: Path) -> dict[str, Any]:
    """A recipe of five unequal devices and two rounds, and its data."""
    data = folder / "requests.jsonl"
    rows = [{"prompt": f"turn on lamp {n}\n", "completion": f"lamp({n})", "label": str(n % 2)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(tiny_llama)},
        "data": {"source": str(data), "max_length": 32},
        "fleet": {"devices": DEVICES, "ranks": [8, 4, 2], "partition": "iid"},
        "train": {"steps": 1, "batch_size": 4, "lr": 0.01},
        "server": {"rounds": 2, "timeout": 60.0},
        "track": {"tensorboard": False},
    }


def config(table: dict[str, Any], **changes: Any) -> RunConfig:
    return build_config(override(table, {key.replace("__", "."): value for key, value in changes.items()}))


def go(grid: Weather, recipe: RunConfig, out: Path, watcher: Any = None) -> list[dict[str, Any]]:
    plan = Plan(config=recipe, out=out, run="run", resume=True, durable=True, window=99, pause=0.001)
    return coordinate(grid, plan, watcher).history


def final(out: Path) -> tuple[bytes, bytes]:
    newest = sorted((out / "checkpoints").glob("round-*"))[-1]
    return (newest / "state.safetensors").read_bytes(), (newest / "run.json").read_bytes()
