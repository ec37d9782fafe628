"""The `zeroth_order` tuner: gradients from forward passes alone, along directions that a seed stands for.

    spsa    g_j = (L(w + eps z_j) - L(w - eps z_j)) / (2 eps)       rho_j = -lr g_j / q          w += sum_j rho_j z_j
    fzoo    d_j = L(w + eps z_j) - L(w),  sigma = std of the L_j    rho_j = -lr d_j / (q sigma)

(MeZO, Malladi et al., NeurIPS 2023; FZOO, Dang et al. 2025)

Only the scalars rho travel: the product of learning rate and projected gradient, so that nobody who rebuilds the model
needs to know the learning rate. What z is depends on the subspace: one of a pool of K, or S v with v in {-1, +1}^K.

With the knob `exchange = "gradient"` the model stays where it is and the scalars are -g_j / (T q): the mean of g_j v_j
over all T q directions estimates the gradient in the subspace, E[g v] = S' grad L. With `path` the model moves as usual
and the scalars are rho_j / (lr T): the same mean along the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.client.data import Batch, Dataset, batches
from fedloom.client.place import Place, pool_fill, sketch_fill
from fedloom.client.progress import report
from fedloom.client.training import forward_logits, loss_sum, read_knobs
from fedloom.protocols.config import Train
from fedloom.protocols.directions import pool_keys, sign_vector
from fedloom.protocols.messages import Over, Scalars, Task
from fedloom.protocols.seeds import derive_seed, draw_indices


class SketchWalk:
    """Steps along S v_n, the n-th direction that the task's seed gives: c += rho v_n, the model is W0 + S c."""

    def __init__(self, place: Place, task: Task) -> None:
        self._place, self._seed, self.c = place, task.seed, place.start.copy()

    @contextmanager
    def at(self, n: int, eps: float) -> Iterator[None]:
        c = self.c + eps * self._vector(n) if eps else self.c
        with self._place.at(sketch_fill(self._place.subspace, c)):
            yield

    def move(self, n: int, rho: float) -> None:
        self.c += rho * self._vector(n)

    def scalars(self, values: NDArray[np.float32]) -> Scalars:
        return Scalars(over=Over.STEPS, k=self._place.subspace.k, values=values, seed=self._seed)

    def weight(self, n: int) -> float:
        return 1.0

    def _vector(self, n: int) -> NDArray[np.float32]:
        return sign_vector(self._seed, n, self._place.subspace.k)


class PoolWalk:
    """Steps along the directions of a pool that the server listed, or that the task's seed draws."""

    def __init__(self, place: Place, task: Task, count: int) -> None:
        self._place, self.indices, self._weights = place, *listed(task, place.subspace.k, count)
        self._keys = pool_keys(place.subspace.seed, self.indices)

    @contextmanager
    def at(self, n: int, eps: float) -> Iterator[None]:
        place = self._place
        with place.at(pool_fill(place.subspace, self._keys[n : n + 1], np.array([eps], np.float32), place.masters)):
            yield

    def move(self, n: int, rho: float) -> None:
        self._place.step(self._keys[n : n + 1], np.array([rho], np.float32))

    def scalars(self, values: NDArray[np.float32]) -> Scalars:
        return Scalars(over=Over.POOL, k=self._place.subspace.k, values=values, indices=self.indices[: len(values)])

    def weight(self, n: int) -> float:
        return float(self._weights[n])


def listed(task: Task, k: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The directions of a task's steps and what each step is multiplied by.

    Raises:
        ValueError: for a list that is too short.
    """
    given = task.start.scalars
    if given is None:
        seed = task.knobs.get("draw_seed", derive_seed(task.seed, "directions"))
        return draw_indices(int(seed), k, count), np.ones(count, np.float32)
    if given.indices is None or given.k != k or len(given.indices) < count:
        raise ValueError(f"a task must list {count} directions out of {k}, got {len(given.values)} out of {given.k}")
    return given.indices[:count], given.values[:count].astype(np.float32)


def zeroth_order(place: Place, dataset: Dataset, task: Task) -> tuple[Scalars, Mapping[str, float]]:
    """Zeroth-order tuning by seeds: SPSA or FZOO, forward passes alone, a scalar a direction.

    Returns:
        The scalars, in the order of the steps; and `loss_sum`, `tokens`, `n`, `steps` as `lora` counts them, the loss
        being the mean over a step's passes.

    Raises:
        ValueError: for a bad knob, or when a loss stops being finite.
    """
    knobs, exchange = read_knobs(task), read_exchange(task)
    if knobs.estimator == "fzoo" and exchange == "path":
        raise ValueError("exchange path must go with estimator spsa (fzoo's scalars are no gradients), got fzoo")
    generator = torch.Generator().manual_seed(derive_seed(task.seed, "train", task.round, task.device))
    stream = batches(dataset, knobs.batch_size, knobs.steps * knobs.accumulate, generator)
    count = knobs.steps * knobs.directions
    sketch = place.subspace.family == "sketch"
    with torch.inference_mode():
        place.prepare(lambda: forward_logits(place.resident, dataset.batch([0])))
        place.begin()
        walk = SketchWalk(place, task) if sketch else PoolWalk(place, task, count)
        values = np.zeros(count, np.float32)
        total: dict[str, float] = {"n": 0, "loss_sum": 0.0, "tokens": 0, "steps": knobs.steps}
        for step in range(knobs.steps):
            parts = list(islice(stream, knobs.accumulate))
            directions = range(step * knobs.directions, (step + 1) * knobs.directions)
            rho = _step(place, walk, parts, directions, knobs, exchange == "gradient", total)
            values[directions.start : directions.stop] = clip_scalars(rho, task.scalar_limit)
            if exchange != "gradient":
                for n in directions:
                    walk.move(n, float(values[n]))
            report(step + 1, knobs.steps, total["loss_sum"] / total["tokens"])
    if exchange == "path":
        values = clip_scalars(values / ((knobs.zo_lr or knobs.lr) * knobs.steps), task.scalar_limit)
    return walk.scalars(values), total


def read_exchange(task: Task) -> str:
    """What a task wants sent: `delta` (where steps lead), `gradient` or `path`.

    Raises:
        ValueError: for anything else.
    """
    exchange = task.knobs.get("exchange", "delta")
    if exchange not in ("delta", "gradient", "path"):
        raise ValueError(f"the task's exchange must be delta, gradient or path, got {exchange!r}")
    return str(exchange)


def _step(
    place: Place,
    walk: SketchWalk | PoolWalk,
    parts: Sequence[Batch],
    directions: range,
    knobs: Train,
    gradient: bool,
    total: dict[str, float],
) -> NDArray[np.float64]:
    """The scalars of one step, from its forward passes."""
    tokens = sum(part.tokens for part in parts)

    def loss(n: int, eps: float) -> float:
        with walk.at(n, eps):
            summed = sum(loss_sum(forward_logits(place.resident, part), part.labels).item() for part in parts)
        if not math.isfinite(summed):
            raise ValueError(f"training diverged: a loss is not finite, with lr {knobs.zo_lr or knobs.lr}")
        return summed / tokens

    if knobs.estimator == "spsa":
        up = np.array([loss(n, knobs.eps) for n in directions])
        down = np.array([loss(n, -knobs.eps) for n in directions])
        slopes, seen = (up - down) / (2 * knobs.eps), float(np.mean(up + down)) / 2
    else:
        if len(directions) < 2:
            raise ValueError(f"train.directions must be at least 2 for fzoo, got {len(directions)}")
        seen = loss(directions.start, 0.0)
        rise = np.array([loss(n, knobs.eps) for n in directions]) - seen
        spread = float(np.std(rise, ddof=1))
        slopes = rise / knobs.eps if gradient else rise / spread if spread else np.zeros_like(rise)
    total["n"] += sum(len(part.ids) for part in parts)
    total["tokens"] += tokens
    total["loss_sum"] += seen * tokens
    rho: NDArray[np.float64] = -slopes * np.array([walk.weight(n) for n in directions]) / len(directions)
    return rho / knobs.steps if gradient else rho * (knobs.zo_lr or knobs.lr)


def clip_scalars(rho: NDArray[np.floating[Any]], limit: float) -> NDArray[np.float32]:
    """Scalars within +-limit, float32; 0 does not clip."""
    return (np.clip(rho, -limit, limit) if limit else rho).astype(np.float32)
