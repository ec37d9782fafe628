"""Flower's own simulation engine (Ray) gives the numbers that the in-process grid gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fedloom.protocols.config import read_recipe
from fedloom.server.checkpoint import latest_checkpoint
from fedloom.simulations.cookbook import find_recipe
from fedloom.simulations.runs import run_recipe

ROOT = Path(__file__).parents[2]
SETTINGS = ("server.rounds=2", "train.steps=3", "fleet.devices=2")


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a Flower home of its own; its SuperLink, which `flwr run` leaves behind, is stopped."""
    home = tmp_path / "flwr"
    home.mkdir()
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    yield environment
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@pytest.mark.slow
def test_flwr_run_equals_in_process(tmp_path: Path, flower_home: dict[str, str]) -> None:
    out = tmp_path / "flower"
    asked = f"recipe='quick' settings='{' '.join(SETTINGS)}' out='{out}'"
    command = ["flwr", "run", ".", "--stream", "--run-config", asked]
    nodes = "num-supernodes=2 client-resources-num-cpus=1"
    done = subprocess.run(
        [*command, "--federation-config", nodes], cwd=ROOT, env=flower_home, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run_recipe(read_recipe(find_recipe("quick"), SETTINGS), tmp_path / "here")

    there, here = (latest_checkpoint(folder / "checkpoints")[0] for folder in (out, tmp_path / "here"))
    assert there is not None, done.stdout[-3000:]
    assert here is not None
    assert there.round == here.round == 2
    assert there.ledger == here.ledger
    assert set(there.state.tensors) == set(here.state.tensors)
    for name, tensor in here.state.tensors.items():
        np.testing.assert_allclose(there.state.tensors[name], tensor, atol=1e-5, err_msg=name)
    for one, other in zip(_evaluations(out), _evaluations(tmp_path / "here"), strict=True):
        for metric, value in one.items():
            assert value == pytest.approx(other[metric], abs=1e-5), metric


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["evaluation"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
