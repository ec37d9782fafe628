"""The pretend devices' private data: embedded households, or a file dealt out among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedloom.client.data import Example
from fedloom.client.readers import read_examples
from fedloom.protocols.config import RunConfig
from fedloom.protocols.seeds import derive_seed
from fedloom.simulations.devices import Profile, profile
from fedloom.simulations.household.households import household
from fedloom.simulations.partition import by_key, dirichlet, iid, quantity

EMBEDDED_MODEL = Path(__file__).parent / "models" / "household"


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one device holds: examples to train on, and others to be judged by."""

    train: Sequence[Example]
    test: Sequence[Example]


class Fleet:
    """The devices of a recipe; each one's data is made when it is first asked for."""

    def __init__(self, config: RunConfig) -> None:
        """Check that the recipe's data and partition fit together, and read a file if it names one.

        Raises:
            ValueError: for a missing or malformed file, or a partition that leaves a device empty.
        """
        self._config = config
        self._profiles = tuple(profile(name) for name in config.fleet.profiles)
        embedded = config.data.source == "household"
        if embedded != (config.fleet.partition == "natural"):
            raise ValueError(
                "recipe keys 'data.source' and 'fleet.partition' must fit: partition 'natural' goes with source "
                f"'household' alone, got {config.data.source!r} with {config.fleet.partition!r}"
            )
        self._holdings = {} if embedded else dict(enumerate(_deal(config)))

    def name(self, index: int) -> str:
        return f"device-{index:04d}" if self._config.fleet.devices > 100 else f"device-{index:02d}"

    def rank(self, index: int) -> int:
        ranks = self._config.fleet.ranks
        return ranks[index % len(ranks)]

    def capability(self, index: int) -> str:
        capabilities = self._config.fleet.capabilities
        return capabilities[index % len(capabilities)]

    def memory(self, index: int) -> int:
        """Bytes that a device lends to the model and its training; 0: no limit."""
        lent = self._config.fleet.memory_mb
        if lent:
            return int(lent[index % len(lent)] * 1e6)
        kind = self.profile(index)
        return kind.available if kind else 0

    def profile(self, index: int) -> Profile | None:
        """What kind of device it is, where the recipe says."""
        return self._profiles[index % len(self._profiles)] if self._profiles else None

    def holding(self, index: int) -> Holding:
        if index not in self._holdings:
            data = self._config.data
            home = household(index, seed=self._config.seed, train_scale=data.train_scale, test_size=data.test_size)
            self._holdings[index] = Holding(train=_examples(home.train), test=_examples(home.test))
        return self._holdings[index]


def _examples(requests: Sequence[object]) -> list[Example]:
    """Household requests as the client's examples."""
    return [Example(prompt=r.prompt, completion=r.completion, label=r.label) for r in requests]  # type: ignore[attr-defined]


def _deal(config: RunConfig) -> list[Holding]:
    examples = read_examples(Path(config.data.source), task=config.model.task, key=config.fleet.key)
    if config.data.limit:
        examples = examples[: config.data.limit]
    generator = np.random.Generator(np.random.Philox(key=derive_seed(config.seed, "partition")))
    holdings = []
    for indices in _partition(config, examples, generator):
        order = generator.permutation(len(indices))
        cut = min(max(1, round(len(indices) * config.data.test_share)), len(indices) - 1)
        shuffled = [examples[indices[position]] for position in order]
        holdings.append(Holding(train=shuffled[cut:], test=shuffled[:cut]))
    return holdings


def _partition(config: RunConfig, examples: Sequence[Example], generator: np.random.Generator) -> list[list[int]]:
    fleet, count = config.fleet, len(examples)
    if fleet.partition == "iid":
        return iid(count, fleet.devices, generator)
    if fleet.partition == "quantity":
        return quantity(count, fleet.devices, fleet.alpha, generator)
    if fleet.partition == "key":
        if not fleet.key:
            raise ValueError("recipe key 'fleet.key' must name a column when 'fleet.partition' is 'key'")
        return by_key([example.owner for example in examples], fleet.devices)
    labels = [example.label for example in examples]
    if len(set(labels)) < 2:
        raise ValueError(f"partition 'dirichlet' needs examples with at least 2 labels, got {len(set(labels))}")
    return dirichlet(labels, fleet.devices, fleet.alpha, generator)
