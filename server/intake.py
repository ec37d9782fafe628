"""What the server lets in: an answer to the task that was asked, whole, finite and of the model's shapes."""

from __future__ import annotations

from dataclasses import replace

from fedloom.protocols.messages import Kind, ModelSpec, Payload, Task, Update
from fedloom.strategies import intake as strategies_intake


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
    strategies_intake.check_update(update, spec, shared_a=not task.train_a)
    for name, term in update.payload.factors.items():
        if (term.rank, term.alpha, term.rslora) != (task.rank, task.alpha, task.rslora):
            raise ValueError(
                f"factors of {name} must have the task's rank {task.rank} and alpha {task.alpha:g}, "
                f"got rank {term.rank} and alpha {term.alpha:g}"
            )


def without_tensors(update: Update) -> Update:
    """What of an update is kept once it is merged: its numbers."""
    return replace(update, payload=Payload())
