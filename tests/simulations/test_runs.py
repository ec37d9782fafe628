"""Whole runs on pretend devices: every strategy, resume to the same bytes, workers, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.protocols.config import RunConfig, build_config, override
from fedloom.server.checkpoint import latest_checkpoint
from fedloom.server.watch import Silent
from fedloom.simulations.runs import run_recipe
from fedloom.strategies.registry import names

WORDS = ("lamp", "oven", "door", "fan")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty requests in a JSONL file."""
    path = tmp_path_factory.mktemp("data") / "requests.jsonl"
    rows = [
        {"prompt": f"turn {state} the {word} {number}\n", "completion": f"{word}({state})", "label": word}
        for number in range(5)
        for word in WORDS
        for state in ("on", "off")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def table(tiny_llama: Path, data: Path) -> dict[str, Any]:
    """A recipe of four unequal devices and three rounds."""
    return {
        "name": "tiny",
        "model": {"path": str(tiny_llama)},
        "data": {"source": str(data), "max_length": 64},
        "fleet": {"devices": 4, "ranks": [8, 4, 2, 2], "partition": "iid"},
        "train": {"steps": 2, "batch_size": 4, "lr": 0.01},
        "server": {"rounds": 3, "cohort": 3, "keep_checkpoints": 9},
        "track": {"tensorboard": False},
    }


def config(table: dict[str, Any], **changes: Any) -> RunConfig:
    return build_config(override(table, {key.replace("__", "."): value for key, value in changes.items()}))


def final_bytes(folder: Path) -> tuple[bytes, bytes]:
    newest = sorted((folder / "checkpoints").glob("round-*"))[-1]
    return (newest / "state.safetensors").read_bytes(), (newest / "run.json").read_bytes()


def evaluations(folder: Path) -> list[Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(json.loads(line)["round"], json.loads(line).get("devices")) for line in lines]


ONLY_SCALARS = ("fedkseed", "fedkseed_pro", "decomfl", "sketch")  # see test_seed_runs.py


@pytest.mark.parametrize("strategy", [name for name in names() if name not in ONLY_SCALARS])
def test_every_strategy_runs_and_learns(table: dict[str, Any], tmp_path: Path, strategy: str) -> None:
    less = {"strategy__target": 0.2} if strategy == "fedspine" else {}  # most of so small a model is spared
    summary = run_recipe(config(table, strategy__name=strategy, model__describe="units", **less), tmp_path)
    (entry,) = summary["strategies"]
    assert entry["loss_after"] < entry["loss_before"]
    assert entry["refused"] == 0
    assert entry["bytes_down"] > 0
    assert entry["bytes_up"] > (0 if strategy == "local" else 1000)
    assert json.loads((tmp_path / "summary.json").read_text())["strategies"] == summary["strategies"]


def test_the_same_recipe_twice_gives_the_same_bytes(table: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_recipe(config(table), tmp_path / name)
    assert final_bytes(tmp_path / "one") == final_bytes(tmp_path / "two")
    assert evaluations(tmp_path / "one") == evaluations(tmp_path / "two")


class CrashError(Exception):
    """A pretend crash."""


@pytest.mark.parametrize("strategy", ["fedloom", "flora", "fedit", "local"])
@pytest.mark.parametrize(
    ("round", "phase"),
    [(0, phase) for phase in ("hello", "evaluate", "ended")]
    + [(round, phase) for round in (1, 2) for phase in ("train", "evaluate", "ended")],
)
def test_resume_ends_in_the_bytes_of_a_run_that_was_never_cut(
    table: dict[str, Any], tmp_path: Path, strategy: str, phase: str, round: int
) -> None:
    """A crash at any phase of any round: as tasks go out, in the middle of the answers, and after the round."""
    recipe = config(table, strategy__name=strategy)

    class Crash(Silent):
        answers = 0

        def answered(self, **about: Any) -> None:
            self.answers += (about["round"], about["phase"]) == (round, phase)
            if self.answers == 2:
                raise CrashError

        def ended(self, *, record: Any) -> None:
            if phase == "ended" and record["round"] == round:
                raise CrashError

    with pytest.raises(CrashError):
        run_recipe(recipe, tmp_path / "cut", watch=lambda label, config: Crash())
    run_recipe(recipe, tmp_path / "cut", resume=True)
    run_recipe(recipe, tmp_path / "whole")
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")


def test_more_rounds_go_on_from_the_last(table: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(config(table, server__rounds=2), tmp_path / "run")
    run_recipe(config(table), tmp_path / "run", resume=True)
    run_recipe(config(table), tmp_path / "whole")
    assert final_bytes(tmp_path / "run") == final_bytes(tmp_path / "whole")


def test_devices_that_were_not_kept_get_the_whole_patch_again(table: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(config(table, server__rounds=2, simulation__keep_devices=False), tmp_path / "run")
    assert not (tmp_path / "run" / "devices" / "patches").exists()
    (entry,) = run_recipe(config(table), tmp_path / "run", resume=True)["strategies"]
    (whole,) = run_recipe(config(table), tmp_path / "whole")["strategies"]
    assert entry["refused"] == 0
    assert entry["loss_after"] == pytest.approx(whole["loss_after"], rel=0.01)  # Adam amplifies the last bits


def test_devices_out_of_step_change_no_byte_with_workers(table: dict[str, Any], tmp_path: Path) -> None:
    """Small cohorts and no evaluation between: devices reach a version by different ways, at the same time."""
    table["server"] |= {"rounds": 6, "cohort": 2}
    for name, workers in (("here", 0), ("there", 2)):
        run_recipe(config(table, eval__every=0, simulation__workers=workers), tmp_path / name)
    assert final_bytes(tmp_path / "here") == final_bytes(tmp_path / "there")
    assert evaluations(tmp_path / "here") == evaluations(tmp_path / "there")


def test_workers_change_no_byte(table: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(config(table), tmp_path / "here")
    run_recipe(config(table, simulation__workers=2), tmp_path / "there")
    assert final_bytes(tmp_path / "here") == final_bytes(tmp_path / "there")
    assert evaluations(tmp_path / "here") == evaluations(tmp_path / "there")


def test_a_comparison_runs_each_line_on_the_same_devices(table: dict[str, Any], tmp_path: Path) -> None:
    table["compare"] = [
        {"label": "alone", "set": {"strategy.name": "local"}},
        {"label": "together", "set": {"strategy.name": "fedloom", "server.rounds": 1}},
    ]
    summary = run_recipe(config(table), tmp_path)
    assert [entry["name"] for entry in summary["strategies"]] == ["alone", "together"]
    assert summary["strategies"][0]["before"] == summary["strategies"][1]["before"]
    assert evaluations(tmp_path / "together")[-1][0] == 1


@pytest.mark.parametrize(("wire", "most"), [("fp16", 0.56), ("bf16", 0.56), ("int8", 0.34)])
def test_narrow_wires_cost_fewer_bytes_and_still_learn(
    table: dict[str, Any], tmp_path: Path, wire: str, most: float
) -> None:
    (wide,) = run_recipe(config(table), tmp_path / "fp32")["strategies"]
    (narrow,) = run_recipe(config(table, wire__up=wire, wire__down=wire), tmp_path / wire)["strategies"]
    assert narrow["bytes_up"] < most * wide["bytes_up"]
    assert narrow["bytes_down"] < most * wide["bytes_down"]
    assert abs(narrow["loss_after"] - wide["loss_after"]) < 0.05 * wide["loss_before"]


def test_a_classifier_tunes_on_a_csv_dealt_out_by_label(
    table: dict[str, Any], tmp_path: Path, tiny_classifier: Path
) -> None:
    rows = [f'"{word} {number} please",{word}' for number in range(20) for word in ("lamp", "oven", "door")]
    (tmp_path / "data.csv").write_text("text,label\n" + "\n".join(rows))
    changes = {
        "model": {"path": str(tiny_classifier), "task": "classify", "labels": ["lamp", "oven", "door"]},
        "data.source": str(tmp_path / "data.csv"),
        "fleet": {"partition": "dirichlet", "alpha": 100.0},
        "train": {"steps": 12, "lr": 0.01},
        "server": {"rounds": 6, "cohort": 0},
    }
    for strategy in ("fedloom", "fedit"):
        recipe = build_config(override(table, changes | {"strategy.name": strategy}))
        (entry,) = run_recipe(recipe, tmp_path / strategy)["strategies"]
        assert entry["metric"] == "accuracy"
        assert entry["after"] > max(0.55, entry["before"])


def test_conv1d_layers_tune_on_chat_messages_dealt_out_by_owner(
    table: dict[str, Any], tmp_path: Path, tiny_gpt2: Path
) -> None:
    talk = [
        {"messages": [{"role": "user", "content": f"lamp {n}"}, {"role": "assistant", "content": "on"}], "who": owner}
        for n in range(6)
        for owner in ("ann", "bob", "cem", "dua")
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    changes = {
        "model.path": str(tiny_gpt2),
        "data.source": str(tmp_path / "talk.jsonl"),
        "fleet": {"partition": "key", "key": "who"},
        "train.steps": 8,
        "lora.rslora": True,
    }
    (entry,) = run_recipe(build_config(override(table, changes)), tmp_path / "run")["strategies"]
    assert entry["loss_after"] < 0.95 * entry["loss_before"]


def test_a_device_with_bad_updates_is_refused_and_the_round_goes_on(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedloom.client import device

    honest = device.Device.handle

    def poisoned(self: Any, task: Any) -> Any:
        update = honest(self, task)
        if task.device == "device-01" and update.payload:
            for factor in update.payload.factors.values():
                factor.b[:] = np.nan
        return update

    monkeypatch.setattr(device.Device, "handle", poisoned)
    (entry,) = run_recipe(config(table, server__cohort=0), tmp_path)["strategies"]
    assert entry["refused"] == 3
    found, _ = latest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    assert all(np.isfinite(tensor).all() for tensor in found.state.tensors.values())
    with pytest.raises(ValueError, match=r"at least 4 good updates, got 3; the first refusal: device-01: .*finite"):
        run_recipe(config(table, server__cohort=0, server__min_updates=4), tmp_path / "strict")


def test_a_base_that_changed_since_the_checkpoint_is_refused(
    table: dict[str, Any], tmp_path: Path, tiny_llama: Path
) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    recipe = config(table, model__path=str(base))
    run_recipe(recipe, tmp_path / "run")
    tensors = load_file(base / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"checkpoint is for base \w{12}, the devices hold \w{12}"):
        run_recipe(config(table, model__path=str(base), server__rounds=4), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strategy.name": "florra"}, "unknown strategy 'florra': did you mean 'flora'"),
        ({"strategy.rank_capp": 3}, "unknown option 'rank_capp' of strategy fedloom: did you mean 'rank_cap'"),
        ({"train.tuner": "lorra"}, "unknown tuner 'lorra': did you mean 'lora'"),
        ({"data.source": "nowhere.jsonl"}, "nowhere.jsonl"),
        (
            {"fleet.ranks": [64]},
            r"rank of device-0\d must be <= 32 for model.layers.0.mlp.down_proj \(32 x 64\), got 64",
        ),
        ({"lora.targets": ["qqq"]}, "qqq"),
        ({"fleet.devices": 30}, "needs at least|2 examples"),
        ({"fleet.partition": "natural"}, "'data.source' and 'fleet.partition' must fit"),
        ({"model.path": "nobody/nothing"}, "nobody/nothing"),
    ],
)
def test_what_a_recipe_gets_wrong_is_one_line(
    table: dict[str, Any], tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        run_recipe(build_config(override(table, changes)), tmp_path / "run")
    assert "\n" not in str(caught.value)
    run_recipe(build_config(override(table, {"server.rounds": 1})), tmp_path / "run")  # a false start blocks nothing


def test_an_existing_run_is_never_written_over_unasked(table: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(config(table, server__rounds=1), tmp_path / "run")
    before = final_bytes(tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run: give --resume to go on with it or --force"):
        run_recipe(config(table), tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        run_recipe(config(table, train__lr=0.5), tmp_path / "run", resume=True)
    assert final_bytes(tmp_path / "run") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ValueError, match="must be empty or hold a run"):
            run_recipe(config(table), tmp_path / "other", force=force)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"
    run_recipe(config(table, train__lr=0.5, server__rounds=1), tmp_path / "run", force=True)
    assert final_bytes(tmp_path / "run") != before
