"""Where a device's adapter begins in a round: see protocols.messages.Start."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import Array, LowRank, ModelSpec, Payload, Start, Task
from fedloom.strategies.ffa import fill_a

ROW_NORM = math.sqrt(1 / 3)  # the expected norm of a row of initial_a: d_in entries of variance 1 / (3 d_in)


def starting_payload(task: Task, spec: ModelSpec, warm: Mapping[str, Array], own: Payload | None) -> Payload:
    """The factors to start from, and what they add to the head.

    Args:
        warm: leading rows of the newest delta's A by module, for `patch`.
        own: what the device ended with last time, for `own`; None starts fresh.
    """
    if task.start_from is Start.OWN and own is not None:
        return own
    if task.start_from is Start.GIVEN:
        return task.start if task.shared_a_seed is None else fill_a(task.start, task.shared_a_seed, spec)
    rows = warm if task.start_from is Start.PATCH else {}
    seed = task.seed if task.shared_a_seed is None else task.shared_a_seed
    factors = {}
    for name, size in spec.matrices.items():
        if task.ranks and name not in task.ranks:
            continue
        rank = task.rank_of(name)
        a = initial_a(seed, name, rank, size.d_in)
        if name in rows:
            a = _warm_start(a, rows[name])
        zero = np.zeros((size.d_out, rank), dtype=np.float32)
        factors[name] = LowRank(b=zero, a=a, alpha=task.alpha_of(name), rslora=task.rslora)
    return Payload(factors=factors, dense=task.start.dense)


def starts_at_zero(task: Task, own: Payload | None) -> bool:
    """Whether the adapter adds nothing before it is trained."""
    return task.start_from in (Start.FRESH, Start.PATCH) or (task.start_from is Start.OWN and own is None)


def _warm_start(a: Array, rows: Array) -> Array:
    """The first rows of `a` replaced by the directions of `rows`, at the norm of random rows; zero rows are no use."""
    rows = rows[: len(a)].astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    usable = norms[:, 0] > 0
    a = a.copy()
    a[: len(rows)][usable] = rows[usable] / norms[usable] * np.float32(ROW_NORM)
    return a
