"""Messages with every field set, and how to compare them."""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import pytest

from fedloom.protocols.messages import (
    Axis,
    Coefficients,
    Hello,
    LowRank,
    MatrixSpec,
    ModelSpec,
    Over,
    Patch,
    Payload,
    Refusal,
    Scalars,
    Scope,
    Subspace,
    Task,
    Update,
)
from fedloom.protocols.shapes import Block, Linear, Shapes


def filled(hint: Any, path: str, count: Iterator[int]) -> Any:
    """A value of a type that no other field has: built from the type alone, so that a new field needs nothing here."""
    if path.endswith(".wire"):
        return "bf16"
    if path.endswith(".keep"):
        return {name: np.arange(size) % size > 0 for name, size in (("z heads", 3), ("a channels", next(count)))}
    if hint is ModelSpec:
        return spec(count)
    if path.endswith(".mask"):
        return f"{next(count):064x}"
    if hint is Subspace:  # each of the two has what the other's scope forbids
        scope = Scope.MASK if "coefficients" in path else Scope.LORA
        own: Any = {"mask": f"{next(count):064x}"} if scope == Scope.MASK else {"rank": 4, "alpha": 2.5, "rslora": True}
        return Subspace(family="rademacher", k=5, seed=2**64 - next(count), scope=scope, directions=next(count), **own)
    if hint is Scalars:
        values = next(count) + np.arange(3, dtype=np.float32)
        return Scalars(over=Over.POOL, k=7, values=values, indices=np.array([6, 0, 3]), seed=next(count))
    if hint is Coefficients:
        steps = np.array([0, -1, next(count), 2**53 - 1, 1 - 2**53])
        return Coefficients(subspace=filled(Subspace, path, count), exponent=-next(count), steps=steps)
    if hint is LowRank:
        rank, start = 2, next(count)
        values = start + np.arange(8 * rank, dtype=np.float32)
        return LowRank(
            b=values[: 5 * rank].reshape(5, rank), a=values[5 * rank :].reshape(rank, 3), alpha=7.5, rslora=True
        )
    if hint is Patch:
        return Patch(
            base_hash=f"hash {next(count)}", since=3, version=next(count), payload=filled(Payload, path, count)
        )
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        made = {}
        for field in dataclasses.fields(typing.cast(Any, hint)):
            made[field.name] = filled(hints[field.name], f"{path}.{field.name}", count)
            if isinstance(field.default, bool):
                made[field.name] = not field.default
        return hint(**made)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {f"z {next(count)}": filled(inner[1], path, count), f"a {next(count)}": filled(inner[1], path, count)}
    if origin is tuple:
        return tuple(filled(inner[0], path, count) for _ in range(3))
    if origin is typing.Annotated or origin in (typing.Union, types.UnionType):
        return filled(inner[0], path, count)
    if origin is np.ndarray:
        return (next(count) + np.arange(6, dtype=np.float32)).reshape(2, 3)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return list(hint)[-1]
    makers: dict[Any, Callable[[int], Any]] = {
        str: lambda n: f"text {n} \u00fc",
        int: lambda n: n,
        float: lambda n: n + 0.25,
        bool: bool,
    }
    return makers[hint](next(count))


def spec(count: Iterator[int]) -> ModelSpec:
    """A spec whose axes lie within its sizes and along its groups."""
    groups = {"z heads": next(count), "a channels": next(count)}
    rows, columns = Axis(group="a channels", width=2, offsets=(1, 200)), Axis(group="z heads", width=3, offsets=(7,))
    d_out, d_in = 300 + next(count), 300 + next(count)
    return ModelSpec(
        base_hash=f"hash {next(count)}",
        matrices={"q": MatrixSpec(d_out=d_out, d_in=d_in, kind="conv1d", rows=rows, columns=columns)},
        dense={"z": (next(count), 2), "a": (next(count),)},
        mask=f"{next(count):064x}",
        groups=groups,
        shapes=shapes(count),
    )


def shapes(count: Iterator[int]) -> Shapes:
    """Shapes whose heads come in whole groups."""
    blocks = tuple(
        Block(heads=3 * kv, kv_heads=kv, head_dim=next(count), ffn=next(count)) for kv in (next(count), next(count))
    )
    linears = {name: Linear(block=1, reads="mixed", d_out=next(count), d_in=next(count)) for name in ("z", "a")}
    family: Any = "gpt2"
    sizes = {name: next(count) for name in ("hidden", "columns", "other", "head")}
    return Shapes(family=family, blocks=blocks, linears=linears, item=9, **sizes)


def plain(value: Any) -> Any:
    """A message as nested lists, so that == compares it whole, the order of mappings included."""
    if isinstance(value, np.ndarray):
        exact = value if value.dtype in (np.int64, np.bool_) else value.astype(np.float32)
        return ["array", value.shape, str(exact.dtype), exact.tolist()]
    if dataclasses.is_dataclass(value):
        return [[field.name, plain(getattr(value, field.name))] for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [[key, plain(entry)] for key, entry in value.items()]
    return [type(value).__name__, value]


def every_message() -> list[Any]:
    return [filled(kind, kind.__name__.lower(), itertools.count(11)) for kind in (Task, Update, Hello, Refusal)]


@pytest.fixture(params=every_message(), ids=lambda message: type(message).__name__)
def message(request: pytest.FixtureRequest) -> Any:
    """Each kind of message in turn, no field at its default."""
    return request.param


@pytest.fixture
def task() -> Any:
    return every_message()[0]


@pytest.fixture
def update() -> Any:
    return every_message()[1]


@pytest.fixture
def as_plain() -> Callable[[Any], Any]:
    return plain
