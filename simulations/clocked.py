"""A pretend device on a virtual clock: its answers say the seconds that a device of its kind would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

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
from fedloom.simulations.clock import Load
from fedloom.simulations.devices import Profile, drifted
from fedloom.strategies.cost import Work, seconds
from fedloom.strategies.patchlog import size
from fedloom.strategies.sparsity import narrowed

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


def step_of(task: Task, ranks: Mapping[str, int], shapes: Shapes, config: RunConfig) -> Work:
    """One forward and backward pass of a task, complete with its knobs, with these adapters."""
    batch = read_knobs(task).batch_size
    return workload(config).step(ranks, causal=not shapes.head, batch=batch, bits=asked_bits(task))


def compute_seconds(shapes: Shapes, step: Work, task: Task, kind: Profile) -> float:
    """What all passes of a task take a kind of device."""
    knobs = read_knobs(task)
    return seconds(shapes, step, kind.speed, steps=knobs.steps * knobs.accumulate)


class Clocked:
    """One device and its kind."""

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
