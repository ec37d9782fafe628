"""Local algorithms by name: the ones that come with Fedloom, and those of the entry-point group `fedloom.tuners`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Protocol

from fedloom.client.data import Dataset
from fedloom.client.model import Resident
from fedloom.client.training import tune
from fedloom.protocols.config import nearest
from fedloom.protocols.messages import Task

GROUP: Final = "fedloom.tuners"


class Tuner(Protocol):
    """Trains the resident's adapters in place, and says what it measured (sums and counts)."""

    def __call__(self, resident: Resident, dataset: Dataset, task: Task, /) -> Mapping[str, float]: ...


_BUILT_IN: Final[Mapping[str, Tuner]] = {"lora": tune}


def names() -> list[str]:
    """Every tuner that can be asked for."""
    return sorted({*_BUILT_IN, *_plugins()})


def describe() -> list[tuple[str, str]]:
    """Each tuner's name and the first line of its documentation."""
    return [(name, (get(name).__doc__ or "").strip().partition("\n")[0]) for name in names()]


def get(name: str) -> Tuner:
    """The tuner of that name.

    Raises:
        ValueError: for a name that nobody registered, or a plugin that cannot be loaded.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    plugins = _plugins()
    if name not in plugins:
        raise ValueError(f"unknown tuner {name!r}: {nearest(name, names())}")
    try:
        tuner: Tuner = plugins[name].load()
    except Exception as error:  # a plugin may fail in any way; it must not take the device with it
        raise ValueError(f"tuner {name!r} ({plugins[name].value}) cannot be loaded: {error}") from error
    return tuner


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
