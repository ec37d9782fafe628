"""What a round gave each device, for its record: only where a strategy treats devices unlike.

A line says what the device was asked to do and what it then cost, for devices whose answer counted:

    {"rank": 12, "ratio": 0.06, "batch": 4, "seconds": 0.61, "tensor_mb": 21.3}                      fedspine
    {"rank": 16, "modules": 9, "ranks": 88, "bits": 8, "batch": 2, "seconds": 0.9, "tensor_mb": 14}  fedpipe

`rank` is the largest, `ranks` the sum over `modules`; MB are 10^6 bytes, as in `fleet.memory_mb`. `tensor_mb` is there
where a device counts its tensors, `out_of_memory` where it ran out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fedloom.protocols.config import Train
from fedloom.protocols.messages import Task, Update
from fedloom.strategies.unequal import BITS, PRUNE_RATIO

DEFAULT_BATCH: int = Train.model_fields["batch_size"].default  # tasks leave out what is the default


def assigned(tasks: Iterable[Task], seen: Sequence[Update]) -> dict[str, dict[str, Any]]:
    """One line per device of `seen` whose task was made for it alone; empty for strategies that make none."""
    asked = {task.device: task for task in tasks if task.ranks or PRUNE_RATIO in task.knobs}
    return {update.device: _line(asked[update.device], update) for update in seen if update.device in asked}


def _line(task: Task, update: Update) -> dict[str, Any]:
    knobs, cost = task.knobs, update.cost
    line: dict[str, Any] = {"rank": task.rank, "batch": knobs.get("batch_size", DEFAULT_BATCH)}
    if task.ranks:
        given = [rank for rank in task.ranks.values() if rank]
        line |= {"modules": len(given), "ranks": sum(given)}
    if PRUNE_RATIO in knobs:
        line["ratio"] = round(float(knobs[PRUNE_RATIO]), 4)
    if BITS in knobs:
        line["bits"] = knobs[BITS]
    line["seconds"] = round(cost.seconds, 3)
    if cost.peak_tensor_bytes:
        line["tensor_mb"] = round(cost.peak_tensor_bytes / 1e6, 1)
    if cost.out_of_memory:
        line["out_of_memory"] = True
    return line
