"""Dealing a data set's examples out to pretend devices: who holds which indices, and how unequal they are.

Every function returns one list of indices per device; the lists are disjoint and, but for `by_key`, hold every index.
Each device holds at least `least` examples: by default two, one to train on and one to be judged by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def iid(count: int, devices: int, generator: np.random.Generator, *, least: int = 2) -> list[list[int]]:
    """Shuffle and deal out evenly (McMahan et al. 2017, arXiv:1602.05629, section 3): sizes differ by at most one.

    Raises:
        ValueError: when there are fewer than `least` examples for each device.
    """
    _check(count, devices, least)
    return _cut(generator.permutation(count), _even(count, devices))


def dirichlet(
    labels: Sequence[str], devices: int, alpha: float, generator: np.random.Generator, *, least: int = 2
) -> list[list[int]]:
    """Equal amounts, unequal labels (Hsu et al. 2019, arXiv:1909.06335, section 3).

    Each device i draws its own mixture of labels, q_i ~ Dirichlet(alpha p), where p is the share of each label in the
    whole set; then its examples, one by one, by a label drawn from q_i. A label that runs out leaves every mixture.
    As alpha grows all devices look like the whole; as it goes to 0 each holds one label, as far as examples reach.
    Devices take turns, so that the labels left at the end are shared and no device is dealt just the rest.

    Raises:
        ValueError: when there are fewer than `least` examples for each device, or alpha is not positive and finite.
    """
    count = len(labels)
    _check(count, devices, least, alpha)
    names, label_of = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    pools = [generator.permutation(np.flatnonzero(label_of == label)).tolist() for label in range(len(names))]
    left = np.array([len(pool) for pool in pools], dtype=float)
    mixtures = generator.dirichlet(alpha * left / count, size=devices)
    dealt: list[list[int]] = [[] for _ in range(devices)]
    for turn in range(count):
        if turn % devices == 0:
            order = generator.permutation(devices)
        device = order[turn % devices]
        weights = np.where(left > 0, mixtures[device], 0.0)
        label = _draw(weights if weights.sum() > 0 else left, generator)
        dealt[device].append(int(pools[label].pop()))
        left[label] -= 1
    return dealt


def quantity(
    count: int, devices: int, alpha: float, generator: np.random.Generator, *, least: int = 2
) -> list[list[int]]:
    """Unequal amounts: shares ~ Dirichlet(alpha) over devices (Li et al. 2022, arXiv:2102.02079, "quantity skew").

    Devices short of `least` are filled up, one example at a time, by whichever device holds the most.

    Raises:
        ValueError: when there are fewer than `least` examples for each device, or alpha is not positive and finite.
    """
    _check(count, devices, least, alpha)
    shares = generator.dirichlet(np.full(devices, alpha))
    bounds = np.rint(np.cumsum(shares) * count).astype(int)
    bounds[-1] = count
    sizes = np.diff(bounds, prepend=0)
    while sizes.min() < least:
        sizes[sizes.argmax()] -= 1
        sizes[sizes.argmin()] += 1
    return _cut(generator.permutation(count), sizes)


def by_key(owners: Sequence[str], devices: int, *, least: int = 2) -> list[list[int]]:
    """One device for each of the `devices` owners with the most examples, ties by name; other owners are left out.

    The natural partition of a file that says who wrote what (Caldas et al. 2018, arXiv:1812.01097).

    Raises:
        ValueError: when fewer owners than devices hold at least `least` examples.
    """
    if devices < 1:
        raise ValueError(f"devices must be >= 1, got {devices}")
    indices: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        indices.setdefault(owner, []).append(index)
    able = sorted((owner for owner in indices if len(indices[owner]) >= least), key=lambda o: (-len(indices[o]), o))
    if len(able) < devices:
        raise ValueError(
            f"a partition by key needs an owner with at least {least} examples for each of {devices} devices, "
            f"got {len(able)} such owners of {len(indices)}"
        )
    return [indices[owner] for owner in able[:devices]]


def _check(count: int, devices: int, least: int, alpha: float = 1.0) -> None:
    if devices < 1:
        raise ValueError(f"devices must be >= 1, got {devices}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if count < least * devices:
        raise ValueError(
            f"a partition over {devices} devices needs at least {least * devices} examples "
            f"({least} for each device), got {count}"
        )


def _even(count: int, devices: int) -> NDArray[np.int64]:
    return count // devices + (np.arange(devices) < count % devices).astype(np.int64)


def _cut(order: NDArray[np.int64], sizes: NDArray[np.int64]) -> list[list[int]]:
    """Consecutive pieces of `order` with the given sizes."""
    pieces = np.split(order, np.cumsum(sizes)[:-1])
    return [[int(index) for index in piece] for piece in pieces]


def _draw(weights: NDArray[np.float64], generator: np.random.Generator) -> int:
    """An index with probability in proportion to its weight; never one of weight zero."""
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
