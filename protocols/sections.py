"""Frozen tables of settings and how TOML becomes one: strict, and wrong in one line that names the key.

Recipes (config.py), a server's settings and a device's are all made of `Section`s.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

T = TypeVar("T", bound=BaseModel)

LARGEST_FILE: Final = 2**20  # bytes
MOST_PARTS: Final = 16  # of a dotted key: reading one takes memory that grows with their square


class Section(BaseModel):
    """A frozen table that takes no key it does not name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest known word, or lists them all when none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options)}"


def build_section(schema: type[T], table: Mapping[str, Any], what: str) -> T:
    """Validate a parsed table; `what` names its kind in errors, as in "recipe key 'seed'".

    Raises:
        ValueError: one line that names the key, what it must be and what was got.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{what} must be a table, got {type(table).__name__}")
    try:
        _known_keys(table, (), schema, what)
        return schema.model_validate(dict(table))
    except ValidationError as error:
        raise ValueError(_in_one_line(error, what)) from None
    except RecursionError:
        raise ValueError(f"{what} must not be nested so deeply") from None


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The table of a TOML file; `what` names the file's kind in errors.

    Raises:
        ValueError: for a missing file or malformed TOML.
    """
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1).decode("utf-8")
        if len(text) > LARGEST_FILE:
            raise ValueError(f"it must be <= {LARGEST_FILE} bytes")
        if _is_deep(text):
            raise ValueError(f"no key may have more than {MOST_PARTS} parts")
        return tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{what} {path} must not be nested so deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} {path} is not TOML: {error}") from None


def _is_deep(text: str) -> bool:
    """Whether a key or a table's name has too many parts; what stands in values does not count."""
    for line in text.splitlines():
        keys = line.split("=")[:-1] + ([line] if line.lstrip().startswith("[") else [])
        if any(re.split("[,{]", key)[-1].count(".") >= MOST_PARTS for key in keys):
            return True
    return False


def _known_keys(table: Mapping[str, Any], where: tuple[str, ...], schema: type[BaseModel], what: str) -> None:
    """Raise on the first key that `schema` does not name, with the nearest that it does."""
    for key, value in table.items():
        known = schema.model_fields
        if key not in known:
            if schema.model_config.get("extra") == "allow":
                continue
            section = f" in [{'.'.join(where)}]" if where else ""
            raise ValueError(f"unknown {what} key {key!r}{section}: {nearest(key, known)}")
        inner = known[key].annotation
        if _is_table(inner) and isinstance(value, Mapping):
            _known_keys(value, (*where, key), inner, what)
        elif isinstance(value, list | tuple) and (each := next(filter(_is_table, get_args(inner)), None)):
            for line in value:
                _known_keys(line if isinstance(line, Mapping) else {}, (*where, key), each, what)


def _is_table(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _in_one_line(error: ValidationError, what: str) -> str:
    """The first key that is wrong, all that it may be, and what was got."""

    def key(loc: tuple[int | str, ...]) -> str:
        return ".".join(str(part) for part in loc if isinstance(part, int) or part.isidentifier())

    first = error.errors()[0]
    where = key(first["loc"])
    may_be = [e["msg"][0].lower() + e["msg"][1:] for e in error.errors() if e["loc"][:2] == first["loc"][:2]]
    return f"{what} key {where!r}: {', or '.join(dict.fromkeys(may_be))}, got {first['input']!r}"
