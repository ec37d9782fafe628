"""examples/flower_app runs as it is, in this process and (slow) under `flwr run .`; so does docs/flower.md."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedloom.protocols.config import build_config
from fedloom.server.flower import FlowerStrategy
from fedloom.simulations.fleet import EMBEDDED_MODEL
from fedloom.simulations.grid import InProcessGrid, pretend_nodes
from fedloom.simulations.runs import run_recipe
from fedloom.simulations.world import pretend_app

ROOT = Path(__file__).parents[2]
APP = ROOT / "examples" / "flower_app"
PAGE = ROOT / "docs" / "flower.md"


def load(name: str) -> ModuleType:
    """A module of the app, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"flower_app_{name}", APP / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_client() -> ClientApp:
    app: ClientApp = load("client_app").app
    return app


def run_config(work: Path, **changes: Any) -> dict[str, Any]:
    """The app's own config, with its files in `work`."""
    table = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return {**table, "work": str(work / "devices"), "out": str(work / "arrays.npz"), **changes}


def run_here(work: Path, **changes: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The app on pretend nodes in this process; its final arrays."""
    config = run_config(work, **changes)
    nodes = pretend_nodes(int(config["min-nodes"]))
    for node in nodes:
        node.run_config = config
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    with InProcessGrid(nodes, make_client) as grid:
        load("server_app").app(grid, context)
    return dict(np.load(config["out"]))


def test_the_app_is_as_short_as_it_says() -> None:
    lines = [
        line
        for file in ("server_app.py", "client_app.py")
        for line in (APP / file).read_text().splitlines()
        if line.strip() and not line.startswith(("import", "from", '"""', "#"))
    ]
    assert len(lines) < 50


def test_it_runs_and_leaves_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = run_here(tmp_path, **{"num-rounds": 2})
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    payload = FlowerStrategy("fedloom").payload(record)
    assert any(np.abs(term.b).max() > 0 for term in payload.factors.values())
    losses = [float(value) for value in re.findall(r"'loss': '([0-9.e+-]+)'", caplog.text)]
    assert len(losses) == 4  # training and evaluation, twice
    assert losses[1] < losses[0]
    assert losses[3] < losses[2]


def test_it_ends_in_the_bits_of_the_same_recipe(tmp_path: Path) -> None:
    arrays = run_here(tmp_path / "flower", **{"num-rounds": 1, "strategy": "flora"})
    recipe = {
        "fleet": {"devices": 4, "ranks": [16, 8, 4, 2]},
        "train": {"steps": 4, "lr": 0.003},
        "server": {"rounds": 1},
        "strategy": {"name": "flora"},
        "track": {"tensorboard": False},
    }
    run_recipe(build_config(recipe), tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "checkpoints" / "round-000001" / "state.safetensors")
    assert set(arrays) - set(ours) == {"fedloom/about"}
    for name, tensor in ours.items():
        assert arrays[name].tobytes() == tensor.tobytes(), name


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    config = build_config({"fleet": {"devices": 2, "ranks": [4, 2]}, "data": {"test_size": 4}})
    monkeypatch.chdir(tmp_path)
    with InProcessGrid(pretend_nodes(2), pretend_app, (config, tmp_path / "devices")) as grid:
        names: dict[str, Any] = {"grid": grid, "base": str(EMBEDDED_MODEL)}
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    assert names["result"].train_metrics_clientapp[1]["refused"] == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL), tmp_path / "adapter")
    assert sum(float(value.abs().sum()) for name, value in model.named_parameters() if "lora_B" in name) > 0


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a Flower home of its own; its SuperLink, which `flwr run` leaves behind, is stopped."""
    home = tmp_path / "flwr"
    home.mkdir()
    yield os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME") == str(home):
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@pytest.mark.slow
def test_flwr_run_equals_in_process(tmp_path: Path, flower_home: dict[str, str]) -> None:
    shutil.copytree(APP, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    there = run_config(tmp_path / "there")
    asked = f"num-rounds=2 min-nodes=2 work='{there['work']}' out='{there['out']}'"
    nodes = "num-supernodes=2 client-resources-num-cpus=1"
    done = subprocess.run(
        ["flwr", "run", ".", "--stream", "--run-config", asked, "--federation-config", nodes],
        cwd=tmp_path / "app",
        env=flower_home,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert Path(there["out"]).exists(), done.stdout[-3000:]
    here = run_here(tmp_path / "here", **{"num-rounds": 2, "min-nodes": 2})
    got = dict(np.load(there["out"]))
    assert set(got) == set(here)
    for name, tensor in here.items():
        np.testing.assert_allclose(got[name], tensor, atol=1e-5, err_msg=name)
