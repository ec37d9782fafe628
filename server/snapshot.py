"""A strategy's state as named arrays alone, for whoever keeps arrays and nothing else: its JSON travels as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.protocols.messages import ModelSpec
from fedloom.strategies.base import State
from fedloom.strategies.packing import spec_from_meta, spec_to_meta

ABOUT = "fedloom/about"  # the array with the JSON; the others are the state's tensors, by name


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A state, whose it is, and which base it is for."""

    strategy: str
    spec: ModelSpec
    state: State

    def must_fit(self, strategy: str, spec: ModelSpec) -> None:
        """Raise ValueError unless it is a state of this strategy, for this base."""
        if self.spec != spec:
            raise ValueError(
                f"the arrays to begin with are for base {self.spec.base_hash[:12]}, "
                f"the devices hold {spec.base_hash[:12]}"
            )
        if self.strategy != strategy:
            raise ValueError(f"the arrays to begin with must be of strategy {strategy!r}, got {self.strategy!r}")


def to_arrays(snapshot: Snapshot) -> dict[str, NDArray[Any]]:
    """A snapshot as arrays; the tensors are not copied."""
    state = snapshot.state
    about = {
        "strategy": snapshot.strategy,
        "spec": spec_to_meta(snapshot.spec),
        "version": state.version,
        "meta": state.meta,
    }
    text = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    return {**{name: np.asarray(tensor) for name, tensor in state.tensors.items()}, ABOUT: text}


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Snapshot:
    """The snapshot that `to_arrays` wrote.

    Raises:
        ValueError: for other arrays.
    """
    if ABOUT not in arrays:
        raise ValueError(f"arrays must be a strategy's state, which has {ABOUT!r}, got {sorted(arrays)[:3]}")
    try:
        about = json.loads(arrays[ABOUT].tobytes())
        tensors = {name: array for name, array in arrays.items() if name != ABOUT}
        state = State(version=int(about["version"]), tensors=tensors, meta=dict(about["meta"]))
        return Snapshot(strategy=str(about["strategy"]), spec=spec_from_meta(about["spec"]), state=state)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{ABOUT!r} must hold what a state has beside its tensors, got {error!r}") from None
