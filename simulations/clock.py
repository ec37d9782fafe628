"""The virtual clock of pretend devices: what a task takes each of them, and what rounds of them took. Nothing sleeps.

A device of a kind (devices.py) receives, computes and sends, one after another; a round is over with the last device
whose answer it takes, and the others wait:

    T_i = 8 down_i / link + operations_i / rate + overhead + 8 up_i / link        T = max_i T_i
    idle = sum_i (T - T_i)                                       FedSpine's figure of merit

`Clocked` makes T_i the seconds that an answer says it took, so that server, strategies and reports read a virtual time
wherever they would read a real one. A round's record has T and idle (server/loop.py); rounds follow each other without
a gap, and `elapsed` adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedloom.client.adjusting import asked_bits
from fedloom.client.cost import shapes_of
from fedloom.client.device import Device
from fedloom.client.model import Resident
from fedloom.client.pruning.rounds import asked_ratio
from fedloom.client.training import read_knobs
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import Hello, Kind, Task, Update
from fedloom.protocols.shapes import Shapes
from fedloom.server.app import workload
from fedloom.simulations.devices import Profile, drifted
from fedloom.strategies.cost import Work, seconds
from fedloom.strategies.patchlog import size
from fedloom.strategies.sparsity import narrowed

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


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
        """How long the device takes, from the round's start to the last byte it sends: T_i."""
        down, up = device.transfer(self.down_bytes, self.up_bytes)
        return down + self.compute_seconds + up


def elapsed(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The seconds that the rounds of these records took, and those that devices waited in them, all together."""
    rounds = [record for record in records if "slowest_seconds" in record]  # round 0 trains nobody
    return {
        "virtual_seconds": sum(record["slowest_seconds"] for record in rounds),
        "idle_seconds": sum(record["idle_seconds"] for record in rounds),
    }


def step_of(task: Task, ranks: Mapping[str, int], shapes: Shapes, config: RunConfig) -> Work:
    """One forward and backward pass of a task, complete with its knobs, with these adapters."""
    batch = read_knobs(task).batch_size
    return workload(config).step(ranks, causal=not shapes.head, batch=batch, bits=asked_bits(task))


def compute_seconds(shapes: Shapes, step: Work, task: Task, kind: Profile) -> float:
    """What all passes of a task take a kind of device."""
    knobs = read_knobs(task)
    return seconds(shapes, step, kind.speed, steps=knobs.steps * knobs.accumulate)


class Clocked:
    """A device whose answers say the seconds that one of its kind would take."""

    def __init__(self, device: Device, kind: Profile, index: int, config: RunConfig, resident: Resident) -> None:
        """`index` draws how its speed drifts.

        Raises:
            ValueError: for a model whose operations cannot be counted.
        """
        self._device, self._kind, self._index, self._config, self._resident = device, kind, index, config, resident
        self.name, self.limit = device.name, device.limit
        shapes_of(resident)

    def hello(self) -> Hello:
        return self._device.hello()

    def handle(self, task: Task) -> Update:
        update = self._device.handle(task)
        if task.kind is not Kind.TRAIN:
            return update
        return replace(update, cost=replace(update.cost, seconds=self._seconds(task, update)))

    def _seconds(self, task: Task, update: Update) -> float:
        """Receiving, computing and sending, one after another; the model is as narrow as the task left it.

        One that ran out of memory is taken to have done so at the end: the server learns of it no sooner.
        """
        config = self._config
        kind = drifted(self._kind, seed=config.seed, index=self._index, round=task.round, compute=config.fleet.drift)
        shapes = shapes_of(self._resident)
        if update.cost.out_of_memory:
            shapes = narrowed(shapes, asked_ratio(task))  # the device went back to the whole model
        ranks = {name: term.rank for name, term in update.payload.factors.items()}
        if not ranks:  # nothing came back: it ran out of memory
            ranks = dict(task.ranks) or dict.fromkeys(self._resident.spec.matrices, task.rank)
        computing = compute_seconds(shapes, step_of(task, ranks, shapes, config), task, kind)
        down = size(task.patch.payload) * BYTES[config.wire.down] if task.patch is not None else 0
        up = size(update.payload) * BYTES[config.wire.up]
        return Load(down_bytes=down, compute_seconds=computing, up_bytes=up).seconds(kind)
