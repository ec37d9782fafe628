"""The one protocol that every aggregation strategy answers, and the state that it evolves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from fedloom.protocols.messages import Array, DeviceReport, ModelSpec, Patch, Payload, Task, Update
from fedloom.strategies.cost import Work


@dataclass(frozen=True, kw_only=True)
class State:
    """A strategy's whole memory: named tensors plus JSON-able metadata, so one checkpoint writer serves every strategy.

    `version` counts the aggregations done: a device that holds version v has seen the first v of them.
    """

    version: int
    tensors: Mapping[str, Array] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How a recipe scales adapters: alpha (None: 2 x rank, one scale for every rank) and whether rsLoRA."""

    alpha: float | None = None
    rslora: bool = False

    def alpha_for(self, rank: int) -> float:
        return 2.0 * rank if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one training step of a recipe is, for strategies that plan by memory and time."""

    batch: int = 8  # texts in a forward pass
    length: int = 128  # tokens of the longest
    steps: int = 8  # optimiser steps a round, each of `accumulate` forward passes
    accumulate: int = 1
    optimizer: Literal["adamw", "sgd", "momentum"] = "adamw"

    def step(self, ranks: Mapping[str, int], *, causal: bool, batch: int = 0, bits: int = 16) -> Work:
        """One forward and backward pass with these adapters, for cost.py; completions at most half of the texts."""
        return Work(
            ranks=ranks,
            batch=batch or self.batch,
            length=self.length,
            width=self.length // 2 if causal else 0,
            bits=bits,
            optimizer=self.optimizer,
        )


@runtime_checkable
class Strategy(Protocol):
    """Pure functions from state to state; a strategy keeps nothing between calls but its options.

    The server fills in what is not the strategy's business (run, nonce, seed, wire, training knobs) after `plan`.
    """

    def init(self, spec: ModelSpec, seed: int, devices: Sequence[DeviceReport] = ()) -> State:
        """The state before the first round; `devices` is the whole fleet, by which some strategies size the adapter."""
        ...

    def plan(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """One training task per device; none for one that has run out of memory at all that it could be asked."""
        ...

    def plan_evaluation(self, state: State, devices: Sequence[DeviceReport], round: int) -> list[Task]:
        """One evaluation task per device, on the current global model (or the device's own, if that is the point)."""
        ...

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """Consume updates as they arrive, in memory flat in their number, and return the next state.

        Raises:
            ValueError: when no update carries an example, or an update contradicts the model's spec.
        """
        ...

    def catch_up(self, state: State, since: int) -> Patch | None:
        """What a device that last saw version `since` needs; None when it needs nothing merged."""
        ...

    def adapter(self, state: State) -> Payload:
        """The global model as a payload relative to the public base, for export."""
        ...
