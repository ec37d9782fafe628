"""Tasks that leave a device room: what they may have it make smaller, and what it says when that was not enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from fedloom.client.lora import Adapters, check_rank
from fedloom.client.model import Resident
from fedloom.client.pruning.narrowing import apply_keep
from fedloom.client.pruning.rounds import asked_ratio
from fedloom.protocols.messages import Cost, Kind, ModelSpec, Payload, Start, Task, Update
from fedloom.strategies.cost import BITS as KNOWN_BITS
from fedloom.strategies.unequal import BITS, PRUNE_RATIO, RANK, RATIO, REPEATED


@contextmanager
def listening(resident: Resident, observe: Callable[[Adapters], None] | None) -> Iterator[None]:
    """Have `observe` told of the adapters' gradients, step by step, inside the block."""
    resident.adapters.on_gradients = observe
    try:
        yield
    finally:
        resident.adapters.on_gradients = None


def check_adjusted(task: Task, spec: ModelSpec) -> None:
    """Hold what a task would have made smaller against the model, before any of it is done.

    Raises:
        ValueError: for knobs out of bounds, modules that the model does not have or ranks that do not fit them, or what
            cannot be had together: units removed from a base of few bits, or in a subspace, or from a given adapter.
    """
    bits, ratio, keep = asked_bits(task), asked_ratio(task), task.start.keep
    for name, rank in task.ranks.items():
        if name not in spec.matrices:
            raise ValueError(f"a task's ranks must be of the model's adapted modules, got {name[:80]!r}")
        check_rank(rank, {name: spec.matrices[name]})
    if task.subspace is not None and (keep or task.ranks or bits != KNOWN_BITS[0]):
        raise ValueError("a task in a subspace must be on the whole model in 16 bits, got one that makes it smaller")
    if ratio and not keep:
        raise ValueError(f"a task with the knob {PRUNE_RATIO} must carry the units that may be kept, got none")
    if not keep:
        return
    if bits != KNOWN_BITS[0] or task.ranks:
        raise ValueError("a task that prunes must have one rank and a base in 16 bits, got others")
    if task.start_from not in (Start.FRESH, Start.PATCH) or task.start.factors or task.shared_a_seed is not None:
        raise ValueError("a task that prunes must start from new factors of the device's own, got given ones")
    if task.kind is Kind.TRAIN and not task.send:
        raise ValueError("a task that prunes must ask for its factors, got one that keeps them on the device")


def adjusts(task: Task) -> bool:
    """Whether the server chose this training for this device's memory, and learns from hearing that it was too much."""
    return task.kind is Kind.TRAIN and bool(PRUNE_RATIO in task.knobs or task.ranks)


def keeps_own(task: Task) -> bool:
    """Whether a task goes on from what the device itself remembers: its adapter, or which of its units mattered."""
    return task.start_from is Start.OWN or bool(task.start.keep)


def given_up(task: Task) -> Mapping[str, float]:
    """What a device says of a task that ran out of memory: the arm that it was told to pull."""
    return {RATIO: asked_ratio(task), RANK: float(task.rank), **repeated(task)}


def too_much(task: Task, examples: int) -> Update:
    """The answer to a task that ran out of memory, its cost not yet known; `examples` are those to train on."""
    return Update(
        device=task.device,
        round=task.round,
        examples=examples,
        kind=task.kind,
        run=task.run,
        nonce=task.nonce,
        metrics=given_up(task),
        cost=Cost(out_of_memory=True),
    )


def surrendered(update: Update, task: Task) -> Update:
    """The same update, but that it ran out of memory after all."""
    return replace(update, metrics=given_up(task), payload=Payload(), cost=replace(update.cost, out_of_memory=True))


def repeated(task: Task) -> dict[str, float]:
    """The knobs that an update repeats, so that a server that plans anew each round knows what it asked for."""
    return {name: float(task.knobs[name]) for name in REPEATED if isinstance(task.knobs.get(name), float | int)}


def asked_bits(task: Task) -> int:
    """How many bits a task wants the base held in.

    Raises:
        ValueError: for a knob that is none of the numbers of bits that there are.
    """
    bits = task.knobs.get(BITS, KNOWN_BITS[0])
    if not isinstance(bits, int) or bits not in KNOWN_BITS:
        raise ValueError(f"the knob {BITS} must be one of {KNOWN_BITS}, got {bits!r}")
    return bits


def clean_up(resident: Resident) -> None:
    """Leave nothing of a task on a resident: the whole model at W0 in whatever bits it is, with no adapters.

    What a task costs from here on is its own business, and one that ended midway does no harm.
    """
    resident.rebuilt.restore()
    if resident.prunable is not None:
        apply_keep(resident, {})
    resident.base.restore()
    resident.adapters.clear()
