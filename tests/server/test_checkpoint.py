"""Checkpoints are whole or not there, and a torn one is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedloom.protocols.messages import MatrixSpec, ModelSpec
from fedloom.server.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint, write_checkpoint
from fedloom.strategies.base import State


def checkpoint(round: int) -> Checkpoint:
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3) * round, "a": np.ones(3, dtype=np.float64)}
    return Checkpoint(
        run="abc",
        round=round,
        state=State(version=round, tensors=tensors, meta={"rank": 3}),
        spec=ModelSpec(base_hash="h", matrices={"m": MatrixSpec(d_out=2, d_in=3)}, dense={"head": (4, 2)}),
        roster={"device-00": [round, 0]},
        ledger={"device-00": [10, 20, 0]},
        refused=1,
    )


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, checkpoint(3))
    got, want = read_checkpoint(path), checkpoint(3)
    for name, value in want.state.tensors.items():
        assert got.state.tensors[name].dtype == value.dtype
        np.testing.assert_array_equal(got.state.tensors[name], value)
    assert replace(got, state=want.state) == want
    assert (got.state.version, got.state.meta) == (3, {"rank": 3})


def test_the_same_state_is_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write_checkpoint(tmp_path / name, checkpoint(2)) for name in ("x", "y"))
    for name in ("state.safetensors", "run.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for round in range(5):
        write_checkpoint(tmp_path, checkpoint(round), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000003", "round-000004"]


@pytest.mark.parametrize("damage", ["flip", "cut", "json", "missing"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    write_checkpoint(tmp_path, checkpoint(1))
    newest = write_checkpoint(tmp_path, checkpoint(2))
    tensors = newest / "state.safetensors"
    data = tensors.read_bytes()
    if damage == "flip":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        tensors.write_bytes(data[: len(data) // 2])
    elif damage == "json":
        (newest / "run.json").write_text("{")
    else:
        tensors.unlink()
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.round == 1
    assert len(complaints) == 1
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(newest)


def test_no_good_checkpoint_is_an_error_and_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) == (None, [])
    (write_checkpoint(tmp_path, checkpoint(1)) / "state.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="must have SHA-256"):
        latest_checkpoint(tmp_path)


def test_a_draft_left_by_a_crash_is_ignored_and_replaced(tmp_path: Path) -> None:
    draft = tmp_path / ".draft-000001"
    draft.mkdir()
    (draft / "state.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == (None, [])
    write_checkpoint(tmp_path, checkpoint(1))
    assert not draft.exists()
