"""The command line as a person or a script meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.cli.tables import human_bytes
from fedloom.simulations.fleet import EMBEDDED_MODEL

Fedloom = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recipe on the embedded model: one device alone beside two devices together."""
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(
        """
        name = "small"
        [data]
        train_scale = 0.2
        test_size = 4
        [fleet]
        devices = 2
        ranks = [4, 2]
        [train]
        steps = 2
        [server]
        rounds = 1
        [[compare]]
        label = "alone"
        set = { "strategy.name" = "local" }
        [[compare]]
        label = "together"
        """
    )
    return path


def test_help_teaches(fedloom: Fedloom) -> None:
    code, out, _ = fedloom("--help")
    assert code == 0
    assert "fedloom run quick" in " ".join(out.split())
    for command in ("run", "strategies", "tuners", "recipes", "export", "report"):
        assert command in out
        assert fedloom(command, "--help")[0] == 0


@pytest.mark.parametrize("command", ["strategies", "tuners", "recipes"])
def test_lists_name_each_thing_once_with_a_line(fedloom: Fedloom, command: str) -> None:
    rows = json.loads(fedloom(command, "--json")[1])
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) > 0
    assert all(len(line) > 20 for row in rows for key, line in row.items() if key != "name")
    code, out, _ = fedloom(command)
    assert code == 0
    assert names[0] in out


def test_a_strategy_shows_its_options(fedloom: Fedloom) -> None:
    options = {row["option"] for row in json.loads(fedloom("strategies", "fedloom", "--json")[1])}
    assert {"rank_cap", "error_feedback", "energy", "server_optimizer"} <= options


def test_a_run_ends_with_tables_a_report_and_an_adapter_that_peft_loads(
    fedloom: Fedloom, small: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, said, _ = fedloom("run", small, "--out", out)
    assert code == 0
    for word in ("alone", "together", "exact match", "peak memory", str(out / "report.html"), str(out / "adapter")):
        assert word in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["devices"] == 2
    needed = {"name", "metric", "before", "after", "ci95", "bytes_up", "bytes_down", "seconds", "peak_rss_mb"}
    assert all(needed <= entry.keys() for entry in summary["strategies"])

    tokens = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)("turn the kitchen lamp to 40%\n", return_tensors="pt")
    tokens.pop("token_type_ids", None)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    with torch.no_grad():
        plain = base(**tokens).logits
        tuned = PeftModel.from_pretrained(base, out / "adapter")(**tokens).logits
        code, folder, _ = fedloom("export", out, "--format", "merged", "--to", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(folder.strip(), dtype=torch.float32)(**tokens).logits
    assert code == 0
    assert (tuned - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, tuned, atol=1e-4, rtol=0)

    code, page, _ = fedloom("report", out)
    assert (code, Path(page.strip())) == (0, out / "report.html")
    assert fedloom("run", small, "--out", out)[0] == 2
    assert fedloom("run", small, "--out", out, "--resume")[0] == 0


def test_threads_of_the_environment_change_no_byte(tmp_path: Path) -> None:
    """Four rounds merge enough for one BLAS thread and two to round differently, were they not pinned."""
    states = []
    for threads in ("1", "2"):
        out = tmp_path / threads
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS")}
        command = [str(Path(sys.executable).parent / "fedloom"), "run", "quick", "--out", str(out)]
        subprocess.run(
            [*command, "--set", "server.rounds=4"],
            env=environment | {"OMP_NUM_THREADS": threads},
            check=True,
            capture_output=True,
        )
        states.append((out / "checkpoints" / "round-000004" / "state.safetensors").read_bytes())
    assert states[0] == states[1]


def test_json_is_all_that_stdout_holds(fedloom: Fedloom, small: Path, tmp_path: Path) -> None:
    code, said, _ = fedloom("run", small, "--out", tmp_path / "run", "--json", "--set", "seed=3")
    assert code == 0
    assert json.loads(said)["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", "nope"], "fedloom: no recipe 'nope': "),
        (["run", "demos"], "did you mean 'demo'?"),
        (["run", "nowhere.toml"], "fedloom: recipe nowhere.toml cannot be read: No such file or directory"),
        (["run", "quick", "--set", "train.steeps=3"], "unknown recipe key 'steeps' in [train]: did you mean 'steps'?"),
        (["run", "quick", "--set", "train.steps"], "a setting must be key=value, got 'train.steps'"),
        (["run", "quick", "--set", "train.steps=0"], "recipe key 'train.steps': input should be greater than or equal"),
        (["run", "quick", "--set", "strategy.name=flra"], "unknown strategy 'flra': did you mean 'flora'?"),
        (["strategies", "flra"], "unknown strategy 'flra': did you mean 'flora'?"),
        (["export", "nowhere"], "fedloom: nowhere is not a run: it has no recipe.json"),
        (["report", "nowhere"], "fedloom: nowhere is not a finished run"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    fedloom: Fedloom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = fedloom(*arguments)
    assert code == 2
    assert line in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_says_why(fedloom: Fedloom, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert fedloom("run", small, "--out", out)[0] == 0
    code, _, err = fedloom("export", out, "--member", "alone", "--to", tmp_path / "a")
    assert code == 2
    assert "local" in err
    code, _, err = fedloom("export", out, "--member", "both")
    assert (code, err) == (2, f"fedloom: no member 'both' in {out}, it has alone, together\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, _, err = fedloom("export", out, "--to", tmp_path / "mine")
    assert code == 2
    assert "must be empty" in err


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (93.7e6, "93.7 MB")])
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text
