"""metrics.jsonl on resume, and trackers that are not installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.protocols.config import build_config
from fedloom.server.track import JsonlTracker, open_trackers, scalars


def test_lines_past_the_checkpoint_and_torn_lines_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 0}\n{"round": 1}\n{"round": 2}\n{"rou')
    tracker = JsonlTracker(path, after_round=1)
    tracker.log({"round": 2, "x": 1})
    tracker.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"round": 0},
        {"round": 1},
        {"round": 2, "x": 1},
    ]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 0}\n')
    JsonlTracker(path, after_round=None).close()
    assert path.read_text() == ""


def test_scalars_are_flat_and_leave_devices_out() -> None:
    record = {"round": 3, "seconds": 2, "evaluation": {"loss": 0.5}, "devices": {"x": {"n": 1}}}
    assert scalars(record) == {"seconds": 2.0, "evaluation/loss": 0.5}


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    for tracker in open_trackers(build_config({}), tmp_path, "run"):
        tracker.log({"round": 1, "loss": 0.5})
        tracker.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(("key", "package"), [("wandb_project", "wandb"), ("mlflow_uri", "mlflow")])
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=f"track.{key}' needs the package '{package}'"):
        open_trackers(build_config({"track": {key: "x", "tensorboard": False}}), tmp_path, "run")
