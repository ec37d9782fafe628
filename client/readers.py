"""Files of examples: `prompt` and `completion`, or `text` and `label`, as JSONL or CSV; chats (`messages`) as JSONL."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from fedloom.client.data import Example

_CAUSAL = "'prompt' and 'completion', or 'messages'"
_CLASSIFY = "'text' and 'label'"


def read_examples(path: Path, *, task: Literal["causal", "classify"], key: str = "", limit: int = 0) -> list[Example]:
    """Read a file of examples.

    Args:
        task: `causal` takes prompt and completion, or a chat whose last turn is the assistant's; `classify` takes text
            and label.
        key: the column that names an example's owner, if any.
        limit: read at most this many; 0 reads all.

    Raises:
        ValueError: in one line that names the file (and the line) and what is wrong with it.
    """
    rows = _rows(Path(path))
    examples: list[Example] = []
    try:
        for line, row in rows:
            examples.append(_example(row, task, key, f"{path}, line {line}"))
            _check_text(examples[-1], f"{path}, line {line}")
            if limit and len(examples) == limit:
                break
    except OSError as error:
        raise ValueError(f"data file {path} cannot be read: {error.strerror}") from None
    except UnicodeError as error:
        raise ValueError(f"data file {path} must be UTF-8 text: {error}") from None
    if not examples:
        raise ValueError(f"data file {path} must hold at least one example, got none")
    return examples


def _check_text(example: Example, where: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    for text in (example.prompt, example.completion, example.label, example.owner):
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"{where} must hold Unicode text, got a lone surrogate in {text[:80]!r}")


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _jsonl(path)
    if path.suffix.lower() == ".csv":
        return _csv(path)
    raise ValueError(f"a data file must end in .jsonl or .csv, got {str(path)!r}")


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} must be a JSON object: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}")
            yield number, row


def _csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or ())
                    raise ValueError(f"{path}, line {reader.line_num} must have {columns} columns")
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} must be CSV: {error}") from None


def _example(row: Mapping[str, Any], task: str, key: str, where: str) -> Example:
    if key and key not in row:
        raise ValueError(f"{where} must have the owner column {key!r}, got columns {_listed(row)}")
    owner = str(row[key]) if key else ""
    if task == "classify":
        if "text" not in row or "label" not in row:
            raise ValueError(f"{where} must have columns {_CLASSIFY}, got {_listed(row)}")
        return Example(prompt=_text(row, "text", where), label=_label(row["label"], where), owner=owner)
    label = _label(row["label"], where) if "label" in row else ""
    if "messages" in row:
        return _chat(row["messages"], label, owner, where)
    if "prompt" not in row or "completion" not in row:
        raise ValueError(f"{where} must have columns {_CAUSAL}, got {_listed(row)}")
    prompt, completion = _text(row, "prompt", where), _text(row, "completion", where)
    return Example(prompt=prompt, completion=completion, label=label, owner=owner)


def _chat(messages: Any, label: str, owner: str, where: str) -> Example:
    turns = messages if isinstance(messages, list) else []
    good = [turn for turn in turns if isinstance(turn, dict) and {"role", "content"} <= turn.keys()]
    if len(turns) < 2 or len(good) != len(turns) or turns[-1]["role"] != "assistant":
        raise ValueError(
            f"{where} must have 'messages' with a 'role' and a 'content' each, two or more, the last from the assistant"
        )
    kept = tuple({"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns)
    prompt = "\n".join(turn["content"] for turn in kept[:-1])
    return Example(prompt=prompt, completion=kept[-1]["content"], label=label, owner=owner, messages=kept)


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{where} must have text in {column!r}, got {row[column]!r}")
    return str(row[column])


def _label(value: Any, where: str) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).strip()
    raise ValueError(f"{where} must have a name or a whole number in 'label', got {value!r}")


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(str(column)) for column in row) or "none"
