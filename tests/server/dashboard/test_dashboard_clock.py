"""The machine's clock is set while a page watches a run: nothing is taken for silence, and silence is noticed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fedloom.server.dashboard.board import Board

HOURS = 7200.0


def write(folder: Path, moment: float, round: int = 1) -> None:
    event = {"time": moment, "event": "phase", "round": round, "phase": "train", "devices": ["a"]}
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def health(board: Board) -> tuple[str, float]:
    board.refresh()
    _, facts = board.health()
    return facts["status"], facts["seconds_since_event"]


@pytest.mark.parametrize("jump", [HOURS, -HOURS])
def test_a_clock_that_is_set_is_not_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"server": {"timeout": 10.0}}))
    began, uptime = time.time(), time.monotonic()
    board = Board(tmp_path)
    board.refresh()
    write(tmp_path, began)
    assert health(board) == ("running", pytest.approx(0, abs=5))
    write(tmp_path, time.time(), round=2)  # and before it is read:
    monkeypatch.setattr("time.time", lambda: began + jump)
    assert health(board) == ("running", pytest.approx(0, abs=5))
    write(tmp_path, began + jump, round=3)
    assert health(board) == ("running", pytest.approx(0, abs=5))
    monkeypatch.setattr("time.monotonic", lambda: uptime + 1000)
    assert health(board) == ("stale", pytest.approx(1000, abs=5))


def test_a_log_of_an_earlier_day_is_stale_at_first_sight(tmp_path: Path) -> None:
    write(tmp_path, time.time() - 86_400)
    board = Board(tmp_path)
    assert health(board) == ("stale", pytest.approx(86_400, abs=5))
    assert board.health()[0] is False
    write(tmp_path, time.time())
    assert health(board) == ("running", pytest.approx(0, abs=5))
