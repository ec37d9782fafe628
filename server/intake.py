"""What the server lets in: an answer to the task that was asked, whole, finite and of the model's shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import Kind, ModelSpec, Over, Payload, Task, Update
from fedloom.strategies import intake as strategies_intake
from fedloom.strategies.subspace import check_scalars


def check_update(update: Update, task: Task, spec: ModelSpec) -> None:
    """Hold an update against its task and the model.

    Raises:
        ValueError: for an answer to another task (run, round, device, kind, nonce), tensors that nobody asked for, an
            unknown or missing module, a wrong shape, rank or alpha, or a value that is not finite.
    """
    for name in ("run", "round", "device", "kind", "nonce"):
        asked, got = getattr(task, name), getattr(update, name)
        if asked != got:
            raise ValueError(f"an update's {name} must be its task's {asked!r}, got {got!r}")
    if update.examples < 0:
        raise ValueError(f"an update must count examples >= 0, got {update.examples}")
    if not (task.send and task.kind == Kind.TRAIN):
        if update.payload:
            raise ValueError("this task asks for no tensors, got some")
        return
    if task.subspace is not None:
        _check_scalars(update, task)
        return
    strategies_intake.check_update(update, spec, shared_a=not task.train_a)
    for name, term in update.payload.factors.items():
        if (term.rank, term.alpha, term.rslora) != (task.rank, task.alpha, task.rslora):
            raise ValueError(
                f"factors of {name} must have the task's rank {task.rank} and alpha {task.alpha:g}, "
                f"got rank {term.rank} and alpha {term.alpha:g}"
            )


def _check_scalars(update: Update, task: Task) -> None:
    """Scalars along the directions that the task gave, in its order."""
    if task.subspace is None:
        return
    scalars = check_scalars(update, task.subspace, task.scalar_limit)
    if scalars.over == Over.STEPS and scalars.seed != task.seed:
        raise ValueError(f"scalars must be along the directions of the task's seed {task.seed}, got {scalars.seed}")
    listed = task.start.scalars
    if listed is not None and not _begins(listed.indices, scalars.indices):
        raise ValueError("scalars must be along the directions that the task lists, got others")


def _begins(whole: NDArray[np.int64] | None, part: NDArray[np.int64] | None) -> bool:
    return whole is not None and part is not None and np.array_equal(whole[: len(part)], part)


def without_tensors(update: Update) -> Update:
    """What of an update is kept once it is merged: its numbers."""
    return replace(update, payload=Payload())
