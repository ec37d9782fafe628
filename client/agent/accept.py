"""The owner's allow-list: a server can ask for what is on it, and for nothing else."""

from __future__ import annotations

from fedloom.client.settings import Accept
from fedloom.protocols.messages import Kind, Task


def check_base(base_hash: str, accept: Accept) -> None:
    """Raise ValueError unless a base model is one that the owner accepts."""
    if accept.bases and not any(base_hash.startswith(prefix) for prefix in accept.bases):
        raise ValueError(f"this device accepts the bases {_listed(accept.bases)}, got {base_hash[:12]!r}")


def check_task(task: Task, accept: Accept) -> None:
    """Raise ValueError for a task that asks for a strategy, a tuner or a base that the owner does not accept."""
    if accept.strategies and task.strategy not in accept.strategies:
        raise ValueError(f"this device accepts the strategies {_listed(accept.strategies)}, got {task.strategy!r}")
    if accept.tuners and task.kind == Kind.TRAIN and task.tuner not in accept.tuners:
        raise ValueError(f"this device accepts the tuners {_listed(accept.tuners)}, got {task.tuner!r}")
    if task.patch is not None:
        check_base(task.patch.base_hash, accept)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
