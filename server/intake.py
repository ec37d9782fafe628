"""What the server lets in: an answer must be whole, finite, and an answer to the task that was asked."""

from __future__ import annotations

import numpy as np

from fedloom.protocols.messages import ModelSpec, Payload, Task, Update


def check_update(update: Update, task: Task, spec: ModelSpec) -> None:
    """Hold an update against its task and the model.

    Raises:
        ValueError: for an answer to another task (run, round, device, kind, nonce), an unknown or missing module, a
            wrong shape, rank or alpha, or a value that is not finite.
    """
    for name in ("run", "round", "device", "kind", "nonce"):
        asked, got = getattr(task, name), getattr(update, name)
        if asked != got:
            raise ValueError(f"an update's {name} must be its task's {asked!r}, got {got!r}")
    if update.examples < 0:
        raise ValueError(f"an update's number of examples must be >= 0, got {update.examples}")
    if not (task.send and task.kind == "train"):
        if update.payload:
            raise ValueError("this task asks for no tensors, got some")
        return
    _check_factors(update.payload, task, spec)
    _check_dense(update.payload, spec)


def _check_factors(payload: Payload, task: Task, spec: ModelSpec) -> None:
    if set(payload.factors) != set(spec.matrices):
        odd = sorted(set(payload.factors) ^ set(spec.matrices))
        raise ValueError(f"an update must carry each adapted module once, got a difference in {odd[:3]}")
    for name, factor in payload.factors.items():
        matrix = spec.matrices[name]
        if factor.b.shape[0] != matrix.d_out or factor.a.shape[1] != matrix.d_in:
            raise ValueError(
                f"factors of {name} must be for {matrix.d_out} x {matrix.d_in}, "
                f"got b {factor.b.shape} and a {factor.a.shape}"
            )
        if factor.rank != task.rank or factor.alpha != task.alpha or factor.rslora != task.rslora:
            raise ValueError(
                f"factors of {name} must have the task's rank {task.rank} and alpha {task.alpha:g}, "
                f"got rank {factor.rank} and alpha {factor.alpha:g}"
            )
        if not (np.isfinite(factor.a).all() and np.isfinite(factor.b).all()):
            raise ValueError(f"factors of {name} must be finite, got NaN or infinity")


def _check_dense(payload: Payload, spec: ModelSpec) -> None:
    if set(payload.dense) != set(spec.dense):
        odd = sorted(set(payload.dense) ^ set(spec.dense))
        raise ValueError(f"an update must carry each trained head once, got a difference in {odd[:3]}")
    for name, value in payload.dense.items():
        if value.shape != spec.dense[name]:
            raise ValueError(f"{name} must be {spec.dense[name]}, got {value.shape}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
