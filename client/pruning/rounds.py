"""What a device does with a task on a pruned model: settle what to keep, cut the model to it, and remember why.

A task's start carries the units that the device may keep; its knob `prune_ratio` says what share of all must be gone.
Where the units that it may keep are few enough already, the server chose. Else what goes is chosen by the importance
that the device measured while it trained last (importance.py), or, when it never did, by the fluctuation of what a few
of its own texts make each unit say (fluctuation.py), with biases that make up for the loss. The scores and biases are
the device's own state; only a task that asks for the scores gets them. A device that was pruned and lost them looks at
the whole model again, whose other units are without what it was not sent of their patch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedloom.client.data import Batch, Dataset
from fedloom.client.model import Resident
from fedloom.client.pruning.fluctuation import calibrate, fluctuation_scores, recovery
from fedloom.client.pruning.importance import Importance
from fedloom.client.pruning.narrowing import apply_keep
from fedloom.client.store import Held
from fedloom.client.training import forward_logits, loss_sum, read_knobs
from fedloom.protocols.messages import Array, Kind, Payload, Task
from fedloom.protocols.validate import check_keep
from fedloom.strategies.choosing import Scores, choose_keep, gone, wanted
from fedloom.strategies.masked import Bits, Keep, slice_payload
from fedloom.strategies.unequal import PRUNE_RATIO

CALIBRATION, BATCH = 32, 4  # texts that a start without training looks at, and how many at a time at most
PROBE = 16  # texts that tell what a round took off the loss, as many at a time
_SCORES, _BIASES = "importance/", "bias/"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a device remembers of its own pruning between rounds."""

    scores: Scores = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def payload(self) -> Payload:
        """As the device's store keeps it."""
        dense: dict[str, Array] = {_SCORES + name: np.asarray(v, np.float32) for name, v in self.scores.items()}
        return Payload(dense=dense | {_BIASES + name: bias.numpy() for name, bias in self.biases.items()})


def remembered(payload: Payload | None) -> Memory:
    """What `Memory.payload` wrote; nothing of nothing, or of an adapter that another strategy left."""
    dense = payload.dense if payload is not None else {}
    scores = {n.removeprefix(_SCORES): v.astype(np.float64) for n, v in dense.items() if n.startswith(_SCORES)}
    biases = {n.removeprefix(_BIASES): torch.from_numpy(v.copy()) for n, v in dense.items() if n.startswith(_BIASES)}
    return Memory(scores=scores, biases=biases)


def asked_ratio(task: Task) -> float:
    """The share of all units that a task wants gone.

    Raises:
        ValueError: for a knob that is no number in [0, 1).
    """
    ratio = task.knobs.get(PRUNE_RATIO, 0.0)
    if not isinstance(ratio, float | int) or not 0 <= ratio < 1:
        raise ValueError(f"the knob {PRUNE_RATIO} must be in [0, 1), got {ratio!r}")
    return float(ratio)


def settle(
    resident: Resident, task: Task, held: Held, memory: Memory, examples: Callable[[], Dataset]
) -> tuple[dict[str, Bits], Memory]:
    """Cut the model to what a task lets it keep, less what its ratio wants gone, and put the patch on it.

    Args:
        examples: the device's training data, for the start without training.

    Returns:
        what is kept, and the memory with what a start without training found.

    Raises:
        ValueError: for a model that was not loaded to be pruned, units that it does not have, or a ratio beyond reach.
    """
    if resident.prunable is None:
        raise ValueError('this device must have model.describe = "units" for a task that prunes')
    structure, allowed = resident.prunable.structure, task.start.keep
    check_keep("task.start.keep", allowed, structure.units)
    ratio, keep = asked_ratio(task), dict(allowed)
    left = gone(structure, allowed)
    if any(count > left[kind] for kind, count in wanted(structure, ratio).items()):
        scores = memory.scores
        if not scores:
            _cut(resident, {}, {}, held, task)
            resident.adapters.clear()  # they are another task's
            moments = calibrate(resident, _first(examples(), CALIBRATION, task))
            keep = choose_keep(structure, fluctuation_scores(resident, moments), ratio, keep=allowed)
            memory = Memory(scores={}, biases=recovery(resident, moments, keep))
        else:
            keep = choose_keep(structure, scores, ratio, keep=allowed)
    _cut(resident, keep, memory.biases, held, task)
    return keep, memory


def measure(resident: Resident, memory: Memory) -> Importance:
    """What follows the importance of units while the model trains, from what is remembered."""
    if resident.prunable is None:
        raise ValueError("a model must be loaded to be pruned for its units to be measured")
    return Importance(prunable=resident.prunable, scores={name: v.copy() for name, v in memory.scores.items()})


def probe(resident: Resident, dataset: Dataset, task: Task) -> float:
    """The mean loss of the device's first texts: what training takes off it is how well its arm did."""
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in _first(dataset, PROBE, task):
            total += loss_sum(forward_logits(resident, batch), batch.labels).item()
            tokens += batch.tokens
    return total / tokens


def _first(dataset: Dataset, most: int, task: Task) -> Iterator[Batch]:
    """The first texts, in passes no larger than a training's: what leads up to it needs no more memory than it does."""
    count, size = min(most, len(dataset)), BATCH
    if task.kind is Kind.TRAIN:
        size = min(size, read_knobs(task).batch_size)
    return (dataset.batch(range(at, min(at + size, count))) for at in range(0, count, size))


def _cut(resident: Resident, keep: Keep, biases: Mapping[str, Tensor], held: Held, task: Task) -> None:
    apply_keep(resident, keep, biases)
    digest = hashlib.blake2b(digest_size=16)
    for name, bits in sorted(keep.items()):
        digest.update(f"{name}|".encode() + np.packbits(bits).tobytes())
    patch = slice_payload(held.payload, resident.spec, keep)
    resident.base.apply((held.key, digest.hexdigest()), patch, task.start.dense)
