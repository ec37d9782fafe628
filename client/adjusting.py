"""Tasks that leave a device room: what they may have it make smaller, and what it says when that was not enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fedloom.client.lora import Adapters
from fedloom.client.model import Resident
from fedloom.client.pruning.rounds import KNOB, asked_ratio
from fedloom.protocols.messages import Kind, Start, Task
from fedloom.strategies.unequal import BITS, RANK, RATIO, REPEATED


@contextmanager
def listening(resident: Resident, observe: Callable[[Adapters], None] | None) -> Iterator[None]:
    """Have `observe` told of the adapters' gradients, step by step, inside the block."""
    resident.adapters.on_gradients = observe
    try:
        yield
    finally:
        resident.adapters.on_gradients = None


def adjusts(task: Task) -> bool:
    """Whether the server chose this training for this device's memory, and learns from hearing that it was too much."""
    return task.kind is Kind.TRAIN and (KNOB in task.knobs or bool(task.ranks))


def keeps_own(task: Task) -> bool:
    """Whether a task goes on from what the device itself remembers: its adapter, or which of its units mattered."""
    return task.start_from is Start.OWN or bool(task.start.keep)


def given_up(task: Task) -> Mapping[str, float]:
    """What a device says of a task that ran out of memory: the arm that it was told to pull."""
    return {RATIO: asked_ratio(task), RANK: float(task.rank), **repeated(task)}


def repeated(task: Task) -> dict[str, float]:
    """The knobs that an update repeats, so that a server that plans anew each round knows what it asked for."""
    return {name: float(task.knobs[name]) for name in REPEATED if isinstance(task.knobs.get(name), float | int)}


def asked_bits(task: Task) -> int:
    """How many bits a task wants the base held in.

    Raises:
        ValueError: for a knob that is no whole number.
    """
    bits = task.knobs.get(BITS, 16)
    if not isinstance(bits, int):
        raise ValueError(f"the knob {BITS} must be a whole number, got {bits!r}")
    return bits
