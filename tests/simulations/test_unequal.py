"""Runs of strategies that fit their tasks to devices: within memory, on a virtual clock, to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.client import device as devices
from fedloom.client.cost import shapes_of
from fedloom.client.model import Resident, load_model
from fedloom.protocols.config import Lora, Model, RunConfig, build_config, override
from fedloom.protocols.messages import Kind, Patch, Task, Update
from fedloom.server.app import build_strategy, workload
from fedloom.server.watch import Silent
from fedloom.simulations.clock import Clocked, Load
from fedloom.simulations.devices import drifted, profile
from fedloom.simulations.planned import plan_fleet
from fedloom.simulations.runs import run_recipe
from fedloom.simulations.world import World
from fedloom.strategies import fedspine
from fedloom.strategies.cost import Work, memory, seconds
from fedloom.strategies.fedspine import FedSpine
from fedloom.strategies.patchlog import size
from fedloom.strategies.sparsity import narrowed

TARGET = 0.25


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "requests.jsonl"
    rows = [
        {"prompt": f"turn {state} the {word} {number} and then the other {word}\n", "completion": f"{word}({state})"}
        for number in range(5)
        for word in ("lamp", "oven", "door", "fan")
        for state in ("on", "off")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def resident(tiny_llama: Path) -> Resident:
    return load_model(Model(path=str(tiny_llama), describe="units"), Lora(), seed=0)


@pytest.fixture
def recipe(tiny_llama: Path, data: Path, resident: Resident) -> Callable[..., RunConfig]:
    """Four devices of three kinds; the second lends so little that no arm fits it before it is pruned."""

    def make(strategy: str, **changes: Any) -> RunConfig:
        options = {"target": TARGET, "ramp": 4, "max_rank": 8} if strategy == "fedspine" else {}
        table = {
            "model": {"path": str(tiny_llama), "describe": "units"},
            "data": {"source": str(data), "max_length": 24},
            "fleet": {
                "devices": 4,
                "ranks": [8, 8, 4, 2],
                "partition": "iid",
                "profiles": ["jetson-agx-xavier", "jetson-tx2", "phone"],
                "drift": 0.2,
            },
            "train": {"steps": 2, "batch_size": 4, "lr": 0.01},
            "server": {"rounds": 3, "cohort": 4, "keep_checkpoints": 9},
            "track": {"tensorboard": False},
            "strategy": {"name": strategy, **options},
        }
        lent = least(build_config(table), resident)
        table["fleet"]["memory_mb"] = [64.0, lent / 1e6, 64.0, 64.0]
        return build_config(override(table, {key.replace("__", "."): value for key, value in changes.items()}))

    return make


def least(config: RunConfig, resident: Resident) -> int:
    """Bytes between what the smallest arm takes and what it would take without making anything smaller."""
    strategy, shapes = build_strategy(config), shapes_of(resident)
    if isinstance(strategy, FedSpine):
        low, high = strategy.need(resident.spec, TARGET, 1), strategy.need(resident.spec, 0.0, 1)
    else:
        step = workload(config).step(dict.fromkeys(shapes.linears, 1), causal=True)
        low, high = (memory(shapes, one).total for one in (Work(**{**vars(step), "batch": 1}), step))
    assert low < high
    return (low + high) // 2


def final_bytes(folder: Path) -> tuple[bytes, bytes]:
    newest = sorted((folder / "checkpoints").glob("round-*"))[-1]
    return (newest / "state.safetensors").read_bytes(), (newest / "run.json").read_bytes()


@pytest.mark.parametrize("strategy", ["fedspine", "fedpipe"])
def test_no_answer_passes_its_device_s_memory(
    recipe: Callable[..., RunConfig], tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, Task, Update]] = []
    honest = devices.Device.handle

    def noting(self: Any, task: Task) -> Update:
        update = honest(self, task)
        seen.append((self._memory, task, update))
        return update

    monkeypatch.setattr(devices.Device, "handle", noting)
    (entry,) = run_recipe(recipe(strategy), tmp_path)["strategies"]
    assert entry["refused"] == 0
    assert entry["loss_after"] < entry["loss_before"]
    trained = [(limit, task, update) for limit, task, update in seen if task.kind is Kind.TRAIN]
    assert len(trained) == 12
    for limit, _, update in seen:
        assert update.cost.out_of_memory or 0 < update.cost.peak_tensor_bytes <= limit
    small = [(task, update) for _, task, update in trained if task.device == "device-01"]
    assert not any(update.cost.out_of_memory for _, update in small)
    for task, _ in small:
        if strategy == "fedspine":
            assert task.knobs["prune_ratio"] > 0
        else:
            assert task.knobs["batch_size"] < 4 or task.knobs["bits"] < 16


def test_a_pruned_device_receives_its_slice_in_the_time_and_bytes_that_were_planned(
    recipe: Callable[..., RunConfig], resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan says of a round's patch is what the next round sends; and the clock counts that, and no more."""
    seen: list[tuple[Task, float]] = []
    honest = Clocked.handle

    def noting(self: Clocked, task: Task) -> Update:
        update = honest(self, task)
        seen.append((task, update.cost.seconds))
        return update

    monkeypatch.setattr(Clocked, "handle", noting)
    config = recipe("fedspine", server__rounds=2, wire__down="fp16", eval__every=9, fleet__drift=0.0)
    run_recipe(config, tmp_path)
    plan = {one.device: one for one in plan_fleet(config, resident)}
    second = {task.device: task for task, _ in seen if task.kind is Kind.TRAIN and task.round == 2}
    assert second.keys() == plan.keys()
    whole = max(one.down or 0 for one in plan.values())
    for name, task in second.items():
        assert task.patch is not None
        assert 2 * size(task.patch.payload) == plan[name].down
    assert (plan["device-01"].down or whole) < 0.95 * whole

    task = second["device-01"]
    assert task.patch is not None
    device = World(config, tmp_path / "again").device(1)
    base = Task(**{**vars(task), "patch": None})
    patched = Task(**{**vars(task), "patch": Patch(**{**vars(task.patch), "since": 0})})
    times = [device.handle(one).cost.seconds for one in (base, patched)]
    wanted = Load(down_bytes=2 * size(task.patch.payload)).seconds(profile("jetson-tx2")) - Load().seconds(
        profile("jetson-tx2")
    )
    assert times[1] - times[0] == pytest.approx(wanted, rel=1e-6)


def test_slices_change_what_is_sent_and_nothing_else(
    recipe: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose devices get all of every patch ends in the same state; rewards must not count seconds for that."""
    config = recipe("fedspine", server__rounds=4, server__cohort=3, wire__down="fp16", strategy__reward_time=False)
    (sliced,) = run_recipe(config, tmp_path / "sliced")["strategies"]
    monkeypatch.setattr(fedspine, "slice_patch", lambda patch, spec, keep: patch)
    (whole,) = run_recipe(config, tmp_path / "whole")["strategies"]
    assert final_bytes(tmp_path / "sliced")[0] == final_bytes(tmp_path / "whole")[0]
    assert sliced["loss_after"] == whole["loss_after"]
    assert sliced["bytes_down"] < 0.95 * whole["bytes_down"]
    assert sliced["bytes_up"] == whole["bytes_up"]


@pytest.mark.parametrize("strategy", ["fedspine", "fedpipe"])
def test_workers_change_no_byte(recipe: Callable[..., RunConfig], tmp_path: Path, strategy: str) -> None:
    for workers in (0, 2):
        run_recipe(recipe(strategy, simulation__workers=workers), tmp_path / str(workers))
    assert final_bytes(tmp_path / "0") == final_bytes(tmp_path / "2")


class CutError(Exception):
    """A pretend crash."""


@pytest.mark.parametrize("strategy", ["fedspine", "fedpipe"])
@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_resume_ends_in_the_bytes_of_a_run_that_was_never_cut(
    recipe: Callable[..., RunConfig], tmp_path: Path, strategy: str, phase: str
) -> None:
    class Cut(Silent):
        answers = 0

        def answered(self, **about: Any) -> None:
            self.answers += (about["round"], about["phase"]) == (2, phase)
            if self.answers == 2:
                raise CutError

    with pytest.raises(CutError):
        run_recipe(recipe(strategy), tmp_path / "cut", watch=lambda label, config: Cut())
    run_recipe(recipe(strategy), tmp_path / "cut", resume=True)
    run_recipe(recipe(strategy), tmp_path / "whole")
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


@pytest.mark.parametrize("ratio", [0.0, TARGET])
def test_seconds_are_a_closed_form(recipe: Callable[..., RunConfig], tmp_path: Path, ratio: float) -> None:
    """(steps x operations) / (the profile's rate, drifted), and the bytes of the link; the same in every world."""
    config = recipe("fedspine", fleet__memory_mb=[64.0], wire__up="fp16")
    found = []
    for name in ("one", "two"):
        world = World(config, tmp_path / name)
        device = world.device(1)
        assert isinstance(device, Clocked)
        strategy = build_strategy(config)
        report = device.hello().report
        state = strategy.init(device.hello().spec, 0, [report])
        (task,) = strategy.plan(state, [report], 3)
        knobs: dict[str, Any] = {**task.knobs, "steps": 2, "batch_size": 4, "prune_ratio": ratio}
        task = Task(**{**vars(task), "run": "r", "knobs": knobs})
        found.append((task, device.handle(task)))
    task, update = found[0]
    assert update.cost.seconds == found[1][1].cost.seconds
    kind = drifted(profile("jetson-tx2"), seed=config.seed, index=1, round=3, compute=0.2)
    shapes = narrowed(shapes_of(load_model(config.model, config.lora, seed=0)), ratio)
    work = Work(ranks=dict.fromkeys(shapes.linears, task.rank), batch=4, length=24, width=12)
    up = 2 * sum(term.a.size + term.b.size for term in update.payload.factors.values())
    up += 2 * sum(value.size for value in update.payload.dense.values())  # what its units are worth
    wanted = Load(compute_seconds=seconds(shapes, work, kind.speed, steps=2), up_bytes=up).seconds(kind)
    assert update.cost.seconds == pytest.approx(wanted, rel=1e-9)


def test_running_out_takes_as_long_as_the_whole(recipe: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = recipe("fedspine", fleet__memory_mb=[0.001])
    device = World(config, tmp_path).device(1)
    strategy, report = build_strategy(config), device.hello().report
    state = strategy.init(device.hello().spec, 0, [report])
    (task,) = strategy.plan(state, [Free.report(report)], 1)
    update = device.handle(Task(**{**vars(task), "run": "r"}))
    assert update.cost.out_of_memory
    assert 0.1 < update.cost.seconds < 10


class Free:
    """A device that says nothing of its memory."""

    @staticmethod
    def report(report: Any) -> Any:
        return type(report)(**{**vars(report), "memory": 0})
