"""Whole runs in a subspace: scalars up, whole numbers down, the same bytes every way, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.protocols.config import RunConfig, build_config, contenders, override
from fedloom.protocols.messages import Kind, Task, Update
from fedloom.server.checkpoint import latest_checkpoint
from fedloom.simulations import naming, runs
from fedloom.simulations.cookbook import RECIPES
from fedloom.simulations.runs import run_recipe

FORWARD = {"train": {"tuner": "zeroth_order", "steps": 6, "lr": 3e-4}}
FIRST = {"train": {"steps": 3, "lr": 3e-3}}
MIXED = {
    "fleet.capabilities": ["backprop", "forward"],
    "train": {"steps": 4, "lr": 3e-3, "zo_lr": 1e-4},
    "strategy": {"exchange": "gradient", "server_optimizer": "fedadam", "server_lr": 3e-3, "server_tau": 1e-8},
}
CASES: dict[str, dict[str, Any]] = {
    "fedkseed": {"strategy.name": "fedkseed", **FORWARD},
    "fedkseed gaussian": {"strategy": {"name": "fedkseed", "family": "gaussian"}, **FORWARD},
    "fedkseed adapters": {"strategy": {"name": "fedkseed", "scope": "lora"}, "train": {"steps": 8, "lr": 1e-2}},
    "fedkseed_pro": {"strategy": {"name": "fedkseed_pro", "draws": 6}, **FORWARD},
    "fedkseed_pro corrected": {"strategy": {"name": "fedkseed_pro", "draws": 6, "correct": True}, **FORWARD},
    "decomfl": {"strategy.name": "decomfl", **FORWARD},
    "sketch zo": {"strategy.name": "sketch", **FORWARD},
    "sketch fzoo": {
        "strategy.name": "sketch",
        "train": {"tuner": "zeroth_order", "steps": 3, "lr": 3e-3, "estimator": "fzoo", "directions": 3},
    },
    "sketch first-order": {"strategy.name": "sketch", **FIRST},
    "sketch adapters": {"strategy": {"name": "sketch", "scope": "lora"}, "train": {"steps": 4, "lr": 3e-2}},
    "sketch mixed": override({"strategy": {"name": "sketch"}}, MIXED),
    "sketch mixed path": override({"strategy": {"name": "sketch"}}, MIXED | {"strategy.exchange": "path"}),
    "sketch falling lr": {"strategy.name": "sketch", "train": {**FIRST["train"], "schedule": "cosine"}},
}


@pytest.fixture
def table(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of four devices and three rounds, with a small subspace and bytes as in production."""
    path = tmp_path / "requests.jsonl"
    rows = [
        {"prompt": f"turn {state} the {word} {number}\n", "completion": f"{word}({state})"}
        for number in range(5)
        for word in ("lamp", "oven", "door", "fan")
        for state in ("on", "off")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "tiny",
        "model": {"path": str(tiny_llama)},
        "data": {"source": str(path), "max_length": 64},
        "fleet": {"devices": 4, "ranks": [8, 4, 2, 2], "partition": "iid"},
        "train": {"batch_size": 4},
        "strategy": {"k": 256},
        "wire": {"up": "int8"},
        "server": {"rounds": 3, "cohort": 3, "keep_checkpoints": 9},
        "track": {"tensorboard": False},
    }


def config(table: dict[str, Any], *changes: dict[str, Any]) -> RunConfig:
    for change in changes:
        table = override(table, change)
    if table["strategy"].get("name", "fedloom") == "fedloom":
        del table["strategy"]["k"]
    return build_config(table)


def final_bytes(folder: Path) -> tuple[bytes, bytes]:
    newest = sorted((folder / "checkpoints").glob("round-*"))[-1]
    return (newest / "state.safetensors").read_bytes(), (newest / "run.json").read_bytes()


def judged(folder: Path) -> list[Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(json.loads(line)["round"], json.loads(line).get("devices")) for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_for_a_few_kilobytes(table: dict[str, Any], tmp_path: Path, case: str) -> None:
    (entry,) = run_recipe(config(table, CASES[case]), tmp_path / "run")["strategies"]
    assert entry["loss_after"] < entry["loss_before"]
    assert entry["refused"] == 0
    trained = entry["bytes_up"] + entry["bytes_down"] - entry["bytes_evaluation"]
    assert trained / (3 * 3) < 2000  # bytes a device and round
    found, _ = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.state.version == 3
    assert sum(tensor.nbytes for tensor in found.state.tensors.values()) < 12 * 256 * 8


@pytest.mark.parametrize("case", ["fedkseed", "sketch mixed"])
def test_workers_and_a_resumed_run_change_no_byte(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    recipe = config(table, CASES[case], {"server.rounds": 4})
    run_recipe(recipe, tmp_path / "whole")
    run_recipe(config(table, CASES[case], {"server.rounds": 4, "simulation.workers": 2}), tmp_path / "workers")
    run_recipe(config(table, CASES[case], {"server.rounds": 2}), tmp_path / "cut")
    run_recipe(recipe, tmp_path / "cut", resume=True)
    for other in ("workers", "cut"):
        assert final_bytes(tmp_path / other)[0] == final_bytes(tmp_path / "whole")[0]
    assert judged(tmp_path / "workers") == judged(tmp_path / "whole")


def test_a_device_that_missed_rounds_judges_the_same_model(table: dict[str, Any], tmp_path: Path) -> None:
    """All devices hold the same test data here: late or not, they measure the same to the last bit."""
    changes = {"server": {"cohort": 1, "rounds": 5}, "eval.every": 0, "strategy.name": "sketch", **FIRST}
    run_recipe(config(table, changes), tmp_path / "sparse")
    run_recipe(config(table, changes, {"eval.every": 1}), tmp_path / "often")
    assert judged(tmp_path / "sparse")[-1] == judged(tmp_path / "often")[-1]


def test_a_falling_learning_rate_makes_the_number_of_rounds_part_of_the_run(table: dict[str, Any]) -> None:
    names = [
        naming.run_name(config(table, {"train.schedule": schedule, "server.rounds": rounds}))
        for schedule in ("constant", "linear")
        for rounds in (3, 4)
    ]
    assert names[0] == names[1]
    assert names[2] != names[3]


@pytest.mark.parametrize("recipe", ["fedkseed", "fedkseed-pro", "decomfl", "sketch", "mixed-fleet"])
def test_there_is_a_recipe_for_each_strategy(recipe: str) -> None:
    from fedloom.protocols.config import read_recipe

    found = read_recipe(RECIPES / f"{recipe}.toml")
    assert found.about
    for _, each in contenders(found):
        runs._preflight(each)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strategy": {"name": "sketch", "k": 1000}}, "a sketch must have a power of two of buckets, got 1000"),
        ({"strategy": {"name": "fedkseed", "k": 0}}, "must have 1..1048576 directions, got 0"),
        ({"strategy": {"name": "fedkseed", "family": "sketch"}}, "option 'family' of strategy fedkseed"),
        (
            {"strategy": {"name": "fedkseed", "scope": "mask"}},
            "devices that hold a mask .recipe key 'model.mask'., got",
        ),
        ({"strategy.name": "fedkseed", "train.tuner": "lora"}, "must have a tuner of scalars .*got 'lora'"),
        ({"strategy.name": "fedkseed", "train.tuner": "subspace"}, "must have a sketch, got directions of family"),
        ({"strategy.name": "fedloom", "train.tuner": "subspace"}, "must have a tuner of factors .*got 'subspace'"),
        ({"strategy": {"name": "fedkseed_pro", "draws": 2}, **FORWARD}, "must list 6 directions out of 256, got 2"),
        ({"strategy.name": "fedloom", "fleet.capabilities": ["forward"]}, "forward passes alone .zeroth_order., got"),
        (
            {"strategy.name": "sketch", "train": {"tuner": "zeroth_order", "estimator": "fzoo"}},
            "train.directions must be at least 2 for fzoo, got 1",
        ),
        ({"strategy.name": "sketch", "train.lr": 1e30}, "training diverged"),
        ({"model.mask": "nowhere.safetensors"}, "must be a file that `fedloom mask` made, got 'nowhere.safetensors'"),
    ],
)
def test_what_a_recipe_gets_wrong_is_one_line(
    table: dict[str, Any], tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        run_recipe(config(table, changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """device-01 answers every training task with its first answer of the run: a replay."""
    from fedloom.client import device

    honest, first, asked = device.Device.handle, dict[str, Update](), list[Task]()

    def replay(self: Any, task: Task) -> Update:
        update = honest(self, task)
        if task.kind is not Kind.TRAIN or self.name != "device-01":
            return update
        asked.append(task)
        return first.setdefault(self.name, update)

    monkeypatch.setattr(device.Device, "handle", replay)
    return asked


def test_a_replayed_update_is_refused_and_counted_and_the_round_goes_on(
    table: dict[str, Any], tmp_path: Path, tampered: list[Task]
) -> None:
    (entry,) = run_recipe(config(table, CASES["fedkseed"], {"server.cohort": 0}), tmp_path / "run")["strategies"]
    assert len(tampered) == 3
    assert entry["refused"] == 2
    found, _ = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.state.version == 3


def test_another_version_of_directions_is_refused_with_both_named(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedloom.client import place

    monkeypatch.setattr(place, "DIRECTIONS_VERSION", 7)
    with pytest.raises(ValueError, match="must be of version 7 on this device, the server asks for version 1"):
        run_recipe(config(table, CASES["sketch zo"]), tmp_path / "run")


def test_scalars_past_the_limit_are_clipped_by_devices_and_so_pass(table: dict[str, Any], tmp_path: Path) -> None:
    limit = {"strategy.scalar_limit": 1e-6}
    (entry,) = run_recipe(config(table, CASES["sketch zo"], limit), tmp_path / "run")["strategies"]
    assert entry["refused"] == 0
    found, _ = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    moved = found.state.tensors["log/total"] * 2.0 ** found.state.meta["log"]["exponents"][0]
    assert 0 < np.abs(moved).max() <= 3 * 6 * 1.01e-6
