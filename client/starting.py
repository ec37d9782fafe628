"""Where a device's adapter begins in a round: see protocols.messages.Start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedloom.protocols.initial import initial_a
from fedloom.protocols.messages import Array, LowRank, ModelSpec, Payload, Start, Task
from fedloom.strategies.ffa import fill_a
from fedloom.strategies.masked import Keep, indices, slice_payload

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


def pruned_start(task: Task, spec: ModelSpec, warm: Mapping[str, Array], keep: Keep) -> Payload:
    """The new factors of a pruned model's adapter, b [kept rows, r] and a [r, kept columns].

    A row of `warm` may be known in the kept columns alone, so its norm cannot be measured: it is taken for what it is
    part of, a singular vector, whose norm is 1 (a longer one, for its direction). One that is zero there is no use.
    """
    random = replace(task, start=Payload(), start_from=Start.FRESH)
    start = slice_payload(starting_payload(random, spec, {}, None), spec, keep)
    if task.start_from is not Start.PATCH:
        return start
    factors = dict(start.factors)
    for name in factors.keys() & warm.keys():
        columns = indices(spec.matrices[name].columns, keep, spec.matrices[name].d_in)
        a = _warm_start(factors[name].a, warm[name][:, columns], least=1.0)
        factors[name] = replace(factors[name], a=a)
    return replace(start, factors=factors)


def starts_at_zero(task: Task, own: Payload | None) -> bool:
    """Whether the adapter adds nothing before it is trained."""
    return task.start_from in (Start.FRESH, Start.PATCH) or (task.start_from is Start.OWN and own is None)


def _warm_start(a: Array, rows: Array, least: float = 0.0) -> Array:
    """The first rows of `a` replaced by the directions of `rows`, at the norm of random rows; zero rows are no use.

    Rows shorter than `least` are taken to be parts of rows of that norm, and stay parts.
    """
    rows = rows[: len(a)].astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    usable = norms[:, 0] > 0
    a = a.copy()
    a[: len(rows)][usable] = rows[usable] / np.maximum(norms[usable], np.float32(least)) * np.float32(ROW_NORM)
    return a
