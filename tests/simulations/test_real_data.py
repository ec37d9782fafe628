"""Real text, dealt out by its natural owners. Slow; skipped where the data is absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedloom.protocols.config import build_config
from fedloom.simulations.runs import run_recipe

DATA = Path(os.environ.get("FEDLOOM_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.slow


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in {DATA}; set FEDLOOM_DATA to a folder that holds it")
    return DATA / name


def test_plays_tune_by_speaking_role(tmp_path: Path) -> None:
    """One device per role: its speeches, each a prompt (the name) and a completion (the first lines)."""
    speeches = [part.split("\n", 1) for part in real("shakespeare.txt").read_text(encoding="utf-8").split("\n\n")]
    rows = [{"prompt": f"{who}\n", "completion": " ".join(said.split()[:12]), "role": who} for who, said in
            (speech for speech in speeches if len(speech) == 2 and speech[0].endswith(":"))]  # fmt: skip
    (tmp_path / "plays.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "data": {"source": str(tmp_path / "plays.jsonl"), "max_length": 96},
        "fleet": {"devices": 8, "partition": "key", "key": "role"},
        "train": {"steps": 8},
        "server": {"rounds": 4},
        "eval": {"every": 0, "metric": "loss"},
    }
    (entry,) = run_recipe(build_config(recipe), tmp_path / "run")["strategies"]
    assert entry["loss_after"] < 0.8 * entry["loss_before"]
