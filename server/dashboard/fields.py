"""Fields of a log's line, checked: its names and reasons were written by devices, and none of them is trusted."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

NAME_LIMIT, TEXT_LIMIT = 128, 500
COUNT_LIMIT = 2**63
DEVICE_LIMIT = 10_000
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, direction, surrogate, private, unassigned, line ends


def clean(text: str, limit: int = TEXT_LIMIT) -> str:
    """`text` in one line of at most `limit` characters, with what cannot be seen or turns lines about made visible."""
    cut = text if len(text) <= limit else f"{text[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(sign) in _UNSEEN else sign for sign in cut)


def text_of(table: Mapping[str, Any], key: str, *, limit: int = TEXT_LIMIT) -> str:
    """A text, cleaned; empty where there is none.

    Raises:
        ValueError: for a value that is no text.
    """
    value = table.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, got {type(value).__name__}")
    return clean(value, limit)


def name_of(table: Mapping[str, Any], key: str = "device") -> str:
    """A device's name, cleaned.

    Raises:
        ValueError: where there is none.
    """
    name = text_of(table, key, limit=NAME_LIMIT)
    if not name:
        raise ValueError(f"{key} must be a name, got none")
    return name


def names_of(table: Mapping[str, Any], key: str, *, most: int) -> list[str]:
    """The first `most` names of a list, cleaned; what is no name is left out."""
    value = table.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, got {type(value).__name__}")
    return [clean(name, NAME_LIMIT) for name in value[:most] if isinstance(name, str) and name]


def count_of(table: Mapping[str, Any], key: str, *, least: int = 0) -> int:
    """A whole number; `least` where there is none.

    Raises:
        ValueError: for a value that is no whole number from `least` up.
    """
    value = table.get(key, least)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < COUNT_LIMIT:
        raise ValueError(f"{key} must be a whole number >= {least}, got {type(value).__name__}")
    return value


def number_of(table: Mapping[str, Any], key: str) -> float | None:
    """A finite number; None where there is none."""
    value = table.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < COUNT_LIMIT:
        return None
    return float(value) if math.isfinite(value) else None


def table_of(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table within a table; an empty one where there is none."""
    value = table.get(key)
    return value if isinstance(value, Mapping) else {}
