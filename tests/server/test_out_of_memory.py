"""Rounds of devices whose tasks were too much for them: the model stays, what is learned is kept, the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from weather import DEVICES, Weather, config, final, go, write_table

from fedloom.client.adjusting import surrendered
from fedloom.protocols.codec import decode, encode
from fedloom.protocols.messages import Task, Update
from fedloom.server.checkpoint import latest_checkpoint
from fedloom.strategies.unequal import PRUNE_RATIO

LIMIT = 2**24


@pytest.fixture
def table(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    table = write_table(tiny_llama, tmp_path)
    return table | {"model": table["model"] | {"describe": "units"}}


class Cramped(Weather):
    """Devices of which some run out of memory in the round that is being trained."""

    def __init__(self, recipe: Any, work: Path) -> None:
        super().__init__(recipe, work)
        self.cramped: dict[int, set[int]] = {}  # round: nodes
        self.bend = self._run_out

    def tasks(self, node: int) -> list[Task]:
        return [decode(frame, Task, limit=LIMIT) for frame in self.sent.get(("train", node), [])]

    def _run_out(self, kind: str, node: int, frame: bytes) -> bytes:
        if kind != "train":
            return frame
        update = decode(frame, Update, limit=LIMIT)
        task = next(task for task in self.tasks(node) if task.round == update.round)
        return encode(surrendered(update, task)) if node in self.cramped.get(update.round, set()) else frame


SPINE = {"strategy__name": "fedspine", "strategy__target": 0.2}
EVERYBODY = set(range(1, DEVICES + 1))


@pytest.mark.parametrize("strategy", ["fedspine", "fedpipe"])
def test_a_round_in_which_all_run_out_is_a_lesson_and_no_version(
    table: dict[str, Any], tmp_path: Path, strategy: str
) -> None:
    rules = {"server__min_updates": DEVICES, "server__rounds": 3, "server__keep_checkpoints": 4}
    recipe = config(table, **(SPINE if strategy == "fedspine" else {"strategy__name": strategy}), **rules)
    grid = Cramped(recipe, tmp_path / "devices")
    grid.cramped = {2: EVERYBODY}
    history = go(grid, recipe, tmp_path / "run")
    assert [record.get("updates") for record in history] == [None, DEVICES, DEVICES, DEVICES]
    assert ["train_loss" in record for record in history] == [False, True, False, True]
    assert history[2]["evaluation"] == history[1]["evaluation"] or strategy == "fedspine"  # which prunes further
    newest, _ = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.state.version == 2
    assert history[-1]["refused"] == 0
    for node in EVERYBODY:
        asked = {task.round: task for task in grid.tasks(node)}
        if strategy == "fedspine":
            arms = {round: (task.knobs[PRUNE_RATIO], task.rank) for round, task in asked.items()}
            assert arms[3] != arms[2]
        else:
            assert float(asked[3].knobs["need"]) <= 0.95 * float(asked[2].knobs["need"])


def test_a_device_that_ran_out_goes_on_from_the_state_it_has(table: dict[str, Any], tmp_path: Path) -> None:
    """Which of its units mattered is on its disk under the last round that it trained in."""
    recipe = config(table, **SPINE, server__rounds=3)
    grid = Cramped(recipe, tmp_path / "devices")
    grid.cramped = {2: {1}}
    go(grid, recipe, tmp_path / "run")
    assert [task.state_round for task in grid.tasks(1)] == [0, 1, 1]
    assert [task.state_round for task in grid.tasks(2)] == [0, 1, 2]
    roster = json.loads(final(tmp_path / "run")[1])["roster"]
    assert {values[1] for values in roster.values()} == {3}


def test_over_selection_waits_for_answers_that_carry_something(table: dict[str, Any], tmp_path: Path) -> None:
    rules = {"server__cohort": 3, "server__over_select": 1.6, "server__rounds": 1, "eval__every": 0}
    recipe = config(table, **SPINE, **rules)
    grid = Cramped(recipe, tmp_path / "devices")
    grid.cramped, grid.slow = {1: {1, 2}}, {3, 4, 5}
    (_, record) = go(grid, recipe, tmp_path / "run")
    assert sum("out_of_memory" in line for line in record["assigned"].values()) == 2
    assert record["updates"] == 5
