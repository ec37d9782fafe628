"""`fedloom export --format pruned`: a run's model cut down by FLAP, or as a file says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.client.pruning.saved import load_pruned

Fedloom = Callable[..., tuple[int, str, str]]
RECIPE = """
name = "small"
[data]
train_scale = 0.1
test_size = 2
[fleet]
devices = 2
ranks = [2]
[train]
steps = 1
[server]
rounds = 1
"""


@pytest.fixture
def run(fedloom: Fedloom, tmp_path: Path) -> Path:
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE)
    assert fedloom("run", recipe, "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def test_a_run_is_exported_pruned(fedloom: Fedloom, run: Path) -> None:
    code, said, _ = fedloom("export", run, "--format", "pruned", "--ratio", 0.25, "--json")
    assert code == 0
    folder = Path(json.loads(said)["folder"])
    assert folder == run / "pruned"
    model = load_pruned(folder)
    groups = json.loads((folder / "manifest.json").read_text())["groups"]
    for kind, units in (("attention", 6), ("ffn", 512)):
        kept = [len(entry["kept"]) for name, entry in groups.items() if name.endswith(kind)]
        assert sum(kept) == 4 * units - units  # a quarter of four layers
        assert kept[-1] == units  # the last is spared
    tokens = AutoTokenizer.from_pretrained(folder)("turn the kitchen lamp to 40%\n", return_tensors="pt")
    tokens.pop("token_type_ids", None)
    assert model.generate(**tokens, max_new_tokens=4).shape[1] > tokens["input_ids"].shape[1]

    code, again, _ = fedloom("export", run, "--format", "pruned", "--keep", folder / "manifest.json", "--to", run / "b")
    assert code == 0
    kept_again = json.loads((Path(again.strip()) / "manifest.json").read_text())
    assert {n: e["kept"] for n, e in kept_again["groups"].items()} == {n: e["kept"] for n, e in groups.items()}
    assert kept_again["biases"] == []

    whole = {name: list(range(entry["units"])) for name, entry in groups.items()}
    (run / "keep.json").write_text(json.dumps(whole))
    assert fedloom("export", run, "--format", "pruned", "--keep", run / "keep.json", "--to", run / "c")[0] == 0
    assert fedloom("export", run, "--format", "merged", "--to", run / "d")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "d", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(load_pruned(run / "c")(**tokens).logits, merged(**tokens).logits)


def test_what_cannot_be_exported_pruned_says_why(fedloom: Fedloom, run: Path) -> None:
    for options, message in (
        (("--format", "pruned"), "say what to prune, with --keep FILE or --ratio SHARE"),
        (("--format", "pruned", "--ratio", 0.9), "attention can be pruned by 0.625 at most, got a share of 0.875"),
        (("--format", "pruned", "--ratio", 0.2, "--keep", "x"), "give --keep FILE or --ratio SHARE, not both"),
        (("--format", "pruned", "--keep", run / "nowhere"), "a keep must be JSON with lists of kept units"),
        (("--format", "peft", "--ratio", 0.2), "--keep and --ratio go with --format pruned, got format peft"),
    ):
        code, _, error = fedloom("export", run, *options)
        assert code == 2
        assert message in error
    assert not (run / "pruned").exists()
