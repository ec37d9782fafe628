"""What tests of the agent start from: settings, a task, and a running agent with its places."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.client.agent.agent import Agent
from fedloom.client.agent.home import Home
from fedloom.client.data import Example
from fedloom.client.settings import DeviceSettings
from fedloom.protocols.messages import Start, Task


def write_examples(path: Path, examples: Sequence[Example]) -> Path:
    lines = [json.dumps({"prompt": e.prompt, "completion": e.completion, "label": e.label}) for e in examples]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_settings(
    folder: Path, model: Path, examples: Sequence[Example], changes: Mapping[str, Any] | None = None
) -> DeviceSettings:
    """Settings of a device `a` with those examples to train on and to be judged by."""
    data = str(write_examples(folder / "data.jsonl", examples))
    table: dict[str, Any] = {
        "name": "a",
        "state": str(folder / "state"),
        "rank": 16,
        "model": {"path": str(model), "device": "cpu"},
        "data": {"train": data, "test": data},
        "accept": {"strategies": ["fedloom"]},
        "rules": {"threads": 1},
        **(changes or {}),
    }
    return DeviceSettings.model_validate(table)


def make_task(**fields: Any) -> Task:
    settings: dict[str, Any] = {"device": "a", "round": 1, "rank": 4, "alpha": 8.0, "start_from": Start.FRESH}
    settings |= {"seed": 5, "run": "ab" * 8, "strategy": "fedloom", "knobs": {"steps": 2, "lr": 0.01, "batch_size": 2}}
    return Task(**(settings | fields))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A running agent and where it lives."""

    settings: DeviceSettings
    home: Home
    agent: Agent
