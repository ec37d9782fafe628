"""What tests of the agent start from: settings, a task, a running agent with its places, and ways to ask it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.client.agent.agent import Agent
from fedloom.client.agent.calls import Calls, calling
from fedloom.client.agent.home import Home
from fedloom.client.data import Example
from fedloom.client.settings import DeviceSettings
from fedloom.protocols.codec import decode_answer, encode
from fedloom.protocols.messages import Refusal, Start, Task, Update

LIMIT = 2**29
LONG = {"steps": 100_000, "lr": 1e-5, "batch_size": 4}


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


def ask(agent: Calls, task: Task | bytes) -> Update | Refusal:
    frame = task if isinstance(task, bytes) else encode(task)
    return decode_answer(agent.perform(frame), (Update, Refusal), limit=LIMIT)


def refusal(agent: Calls, task: Task | bytes) -> Refusal:
    answer = ask(agent, task)
    assert isinstance(answer, Refusal), answer
    return answer


def in_background(stage: Stage, frame: bytes) -> tuple[threading.Thread, list[bytes]]:
    answers: list[bytes] = []

    def call() -> None:
        with calling(stage.home.socket) as calls:
            answers.append(calls.perform(frame))

    thread = threading.Thread(target=call)
    thread.start()
    return thread, answers


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
