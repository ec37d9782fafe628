"""Strategies by name, with their options: ours, and any that an installed package offers.

A third party adds one through an entry point in the group `fedloom.strategies`, naming a frozen keyword-only dataclass
whose fields are its options (the first is `scaling: Scaling`) and that answers the Strategy protocol.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedloom.protocols.sections import nearest
from fedloom.strategies.base import Scaling, Strategy, Workload
from fedloom.strategies.decomfl import DeComFL
from fedloom.strategies.fedit import FedIT
from fedloom.strategies.fedkseed import FedKSeed
from fedloom.strategies.fedkseed_pro import FedKSeedPro
from fedloom.strategies.fedloom import Fedloom
from fedloom.strategies.fedpipe import FedPipe
from fedloom.strategies.fedspine import FedSpine
from fedloom.strategies.ffa import FFA
from fedloom.strategies.flexlora import FlexLoRA
from fedloom.strategies.flora import Flora
from fedloom.strategies.hetlora import HetLoRA
from fedloom.strategies.local import Local
from fedloom.strategies.server_optimizer import MergeOptions
from fedloom.strategies.sketch import Sketch

GROUP = "fedloom.strategies"
FILLED = ("scaling", "work")  # fields that come from the rest of the recipe
_OURS: dict[str, type[Any]] = {
    "fedloom": Fedloom,
    "flora": Flora,
    "flexlora": FlexLoRA,
    "hetlora": HetLoRA,
    "fedit": FedIT,
    "ffa": FFA,
    "fedkseed": FedKSeed,
    "fedkseed_pro": FedKSeedPro,
    "decomfl": DeComFL,
    "sketch": Sketch,
    "fedspine": FedSpine,
    "fedpipe": FedPipe,
    "local": Local,
}


def names() -> list[str]:
    """Every strategy that can be built, ours first."""
    return [*_OURS, *sorted({point.name for point in entry_points(group=GROUP)} - _OURS.keys())]


def describe() -> list[tuple[str, str]]:
    """Each strategy's name and the first line of its docstring."""
    return [(name, (_find(name).__doc__ or "").strip().partition("\n")[0]) for name in names()]


def options(name: str) -> list[tuple[str, Any, str]]:
    """Each option of a strategy, its own first, with its default and what it is.

    Raises:
        ValueError: for an unknown strategy.
    """
    shared = {option.name for option in dataclasses.fields(MergeOptions)}
    fields = [option for option in dataclasses.fields(_find(name)) if option.name not in FILLED]
    own = [option for option in fields if option.name not in shared]
    rest = [option for option in fields if option.name in shared]
    return [(option.name, _default(option), str(option.metadata.get("doc", ""))) for option in (*own, *rest)]


def build(name: str, options: Mapping[str, Any], scaling: Scaling, work: Workload | None = None) -> Strategy:
    """A strategy with these options.

    Raises:
        ValueError: for an unknown strategy or option, naming the nearest, or a value of the wrong type or range.
    """
    kind = _find(name)
    known = [option.name for option in dataclasses.fields(kind) if option.name not in FILLED]
    for option in options:
        if option not in known:
            raise ValueError(f"unknown option {option!r} of strategy {name}: {_hint(option, known)}")
    hints = get_type_hints(kind)
    values: dict[str, Any] = {"scaling": scaling}
    if work is not None and "work" in hints:
        values["work"] = work
    for option, value in options.items():
        if isinstance(value, list) and get_origin(hints[option]) is tuple:  # TOML has lists alone
            value = tuple(value)
        try:
            values[option] = TypeAdapter(hints[option]).validate_python(value, strict=True)
        except ValidationError as error:
            what = f"{error.errors()[0]['msg'].lower()}, got {value!r}"
            raise ValueError(f"option {option!r} of strategy {name}: {what}") from None
    strategy = kind(**values)
    if not isinstance(strategy, Strategy):
        raise ValueError(f"strategy {name} must answer the Strategy protocol, got {kind.__qualname__}")
    return strategy


def _find(name: str) -> type[Any]:
    if name in _OURS:
        return _OURS[name]
    for point in entry_points(group=GROUP):
        if point.name == name:
            kind = point.load()
            if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
                raise ValueError(f"strategy {name} must be a dataclass, got {kind!r}")
            return kind
    raise ValueError(f"unknown strategy {name!r}: {nearest(name, names())}")


def _default(option: dataclasses.Field[Any]) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return None if option.default is dataclasses.MISSING else option.default


def _hint(word: str, known: list[str]) -> str:
    return nearest(word, known) if known else "it has none"
