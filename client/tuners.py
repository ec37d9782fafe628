"""Local algorithms by name: the ones that come with Fedloom, and those of the entry-point groups below.

A tuner of factors trains the adapters; a tuner of scalars works at a place in a subspace (place.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Protocol

from fedloom.client.data import Dataset
from fedloom.client.model import Resident
from fedloom.client.place import Place
from fedloom.client.subspace import subspace
from fedloom.client.training import tune
from fedloom.client.zeroth_order import zeroth_order
from fedloom.protocols.messages import Scalars, Task
from fedloom.protocols.sections import nearest

GROUP: Final = "fedloom.tuners"
SCALAR_GROUP: Final = "fedloom.scalar_tuners"


class Tuner(Protocol):
    """Trains the resident's adapters in place, and says what it measured (sums and counts)."""

    def __call__(self, resident: Resident, dataset: Dataset, task: Task, /) -> Mapping[str, float]: ...


class ScalarTuner(Protocol):
    """Steps from a place in a subspace, and gives the scalars of its steps and what it measured."""

    def __call__(self, place: Place, dataset: Dataset, task: Task, /) -> tuple[Scalars, Mapping[str, float]]: ...


_FACTORS: Final[Mapping[str, Tuner]] = {"lora": tune}
_SCALARS: Final[Mapping[str, ScalarTuner]] = {"zeroth_order": zeroth_order, "subspace": subspace}
FORWARD_ONLY: Final = ("zeroth_order",)  # what a device that cannot backpropagate can run


def names() -> list[str]:
    """Every tuner that can be asked for."""
    return sorted({*_FACTORS, *_SCALARS, *_plugins(GROUP), *_plugins(SCALAR_GROUP)})


def describe() -> list[tuple[str, str]]:
    """Each tuner's name and the first line of its documentation."""
    found = {name: _find(name, _FACTORS, GROUP) or _find(name, _SCALARS, SCALAR_GROUP) for name in names()}
    return [(name, (tuner.__doc__ or "").strip().partition("\n")[0]) for name, tuner in found.items()]


def known(name: str) -> None:
    """Raise ValueError unless there is a tuner of that name that can be loaded."""
    if name not in names():
        raise ValueError(f"unknown tuner {name!r}: {nearest(name, names())}")
    if _find(name, _FACTORS, GROUP) is None:
        get_scalar(name)


def get(name: str) -> Tuner:
    """The tuner of factors of that name.

    Raises:
        ValueError: for a name that nobody registered, or a plugin that cannot be loaded.
    """
    tuner: Tuner | None = _find(name, _FACTORS, GROUP)
    if tuner is None:
        raise ValueError(_unknown(name, "factors", [*_FACTORS, *_plugins(GROUP)]))
    return tuner


def get_scalar(name: str) -> ScalarTuner:
    """The tuner of scalars of that name.

    Raises:
        ValueError: as `get` does.
    """
    tuner: ScalarTuner | None = _find(name, _SCALARS, SCALAR_GROUP)
    if tuner is None:
        raise ValueError(_unknown(name, "scalars", [*_SCALARS, *_plugins(SCALAR_GROUP)]))
    return tuner


def _unknown(name: str, kind: str, able: list[str]) -> str:
    if name in names():
        return f"this strategy must have a tuner of {kind} ({', '.join(able)}), got {name!r}"
    return f"unknown tuner {name!r}: {nearest(name, names())}"


def _find(name: str, built_in: Mapping[str, Any], group: str) -> Any:
    if name in built_in:
        return built_in[name]
    plugins = _plugins(group)
    if name not in plugins:
        return None
    try:
        return plugins[name].load()
    except Exception as error:  # a plugin may fail in any way; it must not take the device with it
        raise ValueError(f"tuner {name!r} ({plugins[name].value}) cannot be loaded: {error}") from error


def _plugins(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
