"""What is fuzzed: each decoder as one function of bytes, with good inputs to begin with and what must hold of the rest.

A target's `check` takes any bytes. It returns for input that was accepted, raises ValueError for input that was refused
(the only way to refuse), and raises Broken where a property fails. Whatever else it raises is a crash.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hypothesis.strategies import SearchStrategy

Havoc = Callable[[bytes], bytes]  # changes bytes anyhow: libFuzzer's mutations, or havoc.py's
MIB: Final = 1 << 20


class Broken(AssertionError):  # noqa: N818 - what a property is
    """A property that a target's input broke."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One decoder.

    Attributes:
        check: see above.
        seeds: good inputs, made anew by code.
        mutate: changes an input along its structure and repairs its lengths and checksums; None: bytes alone.
        inputs: hypothesis' inputs, where they can be built from the structure.
        seconds, memory: the most processor time and bytes that one input may take.
    """

    name: str
    check: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    mutate: Callable[[bytes, random.Random, Havoc], bytes] | None = None
    inputs: Callable[[], SearchStrategy[bytes]] | None = None
    max_len: int = 8192
    seconds: float = 1.0
    memory: int = 8 * MIB


# Each module's targets, and how many shares of the inputs each gets: the ones that strangers reach get the most.
SHARES: Final[dict[str, dict[str, int]]] = {
    "wire_targets": {"frame": 12, "task": 14, "update": 14, "hello": 6, "refusal": 4, "answer": 6},
    "packed_targets": {"coefficients": 8, "rans": 6, "bits": 6},
    "intake_targets": {"intake": 8, "greeting": 4},
    "round_targets": {"rounds": 2},
    "file_targets": {"checkpoint": 4, "checkpoint-torn": 4, "journal": 3, "metrics": 2},
    "device_targets": {"tensorfile": 4, "store": 3, "patch": 3, "mask": 2, "examples": 6},
    "agent_targets": {"heading": 5, "chunks": 5, "answers": 2, "traffic": 1, "outbox": 1, "reason": 1},
    "socket_targets": {"agent-socket": 3},
    "link_targets": {"server-port": 2},
    "watch_targets": {"page": 2, "door": 4, "standing": 1, "device-keys": 2, "snapshot": 2},
    "settings_targets": {
        "recipe": 6,
        "overrides": 4,
        "server-settings": 3,
        "device-settings": 3,
        "bundle": 3,
        "orders": 2,
    },
}


def names() -> list[str]:
    """Every target."""
    return [name for shares in SHARES.values() for name in shares]


def load(name: str, folder: Path) -> Target:
    """A target by name; `folder` is where it may write files.

    Raises:
        ValueError: for an unknown name.
    """
    for module, shares in SHARES.items():
        if name in shares:
            made: dict[str, Target] = importlib.import_module(module).targets(folder)
            return made[name]
    raise ValueError(f"a target must be one of {', '.join(names())}, got {name!r}")


def divide(inputs: int, chosen: Sequence[str]) -> dict[str, int]:
    """`inputs` over the chosen targets by their shares; at least as many in all."""
    shares = {name: count for table in SHARES.values() for name, count in table.items() if name in chosen}
    whole = sum(shares.values())
    return {name: -(-inputs * share // whole) for name, share in shares.items()}


def one_line(error: BaseException) -> None:
    """Raise Broken unless an error's message is one line that says something."""
    text = str(error)
    if not text or "\n" in text:
        raise Broken(f"a refusal must be one line, got {text[:300]!r}") from error


def same(what: str, got: Any, wanted: Any) -> None:
    """Raise Broken unless two things are equal."""
    if got != wanted:
        raise Broken(f"{what} must be {str(wanted)[:300]}, got {str(got)[:300]}")
