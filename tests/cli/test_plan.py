"""`fedloom plan`: what it says is what the strategies plan and cost.py predicts, and nothing is trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fedloom.client.model import Resident, load_model
from fedloom.protocols.config import RunConfig, build_config, read_recipe
from fedloom.protocols.messages import Update
from fedloom.server.app import build_strategy, workload
from fedloom.simulations.cookbook import RECIPES
from fedloom.simulations.planned import plan_fleet, whole_step
from fedloom.simulations.world import base_model
from fedloom.strategies.base import State
from fedloom.strategies.cost import memory
from fedloom.strategies.fedpipe import FedPipe
from fedloom.strategies.fedspine import FedSpine
from fedloom.strategies.unequal import NEED, PASSES

GUIDE = Path(__file__).parents[2] / "docs" / "unequal-devices.md"
Fedloom = Callable[..., tuple[int, str, str]]


def _recipe(name: str, *settings: str) -> RunConfig:
    return read_recipe(RECIPES / f"{name}.toml", settings)


def _resident(config: RunConfig) -> Resident:
    return load_model(base_model(config), config.lora, seed=config.seed)


@pytest.fixture(scope="module")
def spine() -> tuple[RunConfig, Resident]:
    config = _recipe("fedspine", "fleet.devices=8")
    return config, _resident(config)


@pytest.fixture(scope="module")
def pipe() -> tuple[RunConfig, Resident]:
    config = _recipe("fedpipe", "fleet.devices=8", "train.steps=1")
    return config, _resident(config)


@pytest.mark.parametrize("round", [1, 4, 8])
def test_fedspine_keeps_within_memory_and_says_what_bound_it(spine: tuple[RunConfig, Resident], round: int) -> None:
    config, resident = spine
    strategy = build_strategy(config)
    assert isinstance(strategy, FedSpine)
    for device in plan_fleet(config, resident, round=round):
        assert device.ratio is not None
        assert device.memory == strategy.need(resident.spec, device.ratio, device.rank)
        assert device.memory <= device.lends
        sooner = device.ratio > strategy.room(round)[1] + 1e-9
        assert ("ahead of schedule" in device.why) == sooner
        free = strategy.need(resident.spec, 0.0, strategy.max_rank) <= device.lends
        assert free == ("agx" in device.kind)
        assert ("bound by memory" in device.why) != free or round > 1
        assert device.seconds is not None
        assert device.seconds > 0


def test_the_plan_is_what_the_first_round_sends(spine: tuple[RunConfig, Resident]) -> None:
    config, resident = spine
    fresh = build_strategy(config)
    planned = plan_fleet(config, resident)
    assert planned == plan_fleet(config, resident)
    assert {each.device for each in planned} == {f"device-{index:02d}" for index in range(8)}
    assert isinstance(fresh, FedSpine)
    assert all(0 <= (each.ratio or 0) <= fresh.target and 1 <= each.rank <= 32 for each in planned)


def test_the_recipes_memory_binds_at_rank_8(spine: tuple[RunConfig, Resident]) -> None:
    config, resident = spine
    whole, lent = whole_step(config, resident, 8), [mb * 1e6 for mb in config.fleet.memory_mb]
    assert whole == pytest.approx(27.8e6, rel=0.01)
    assert sorted(set(lent))[1] < whole < max(lent)


def test_fedpipe_warms_up_alike_and_then_splits_by_budget(pipe: tuple[RunConfig, Resident]) -> None:
    config, resident = pipe
    first = plan_fleet(config, resident)
    assert all(set(device.ranks.values()) == {4} and device.why.startswith("warm-up") for device in first)
    assert all(device.memory is not None and device.memory <= device.lends for device in first)
    assert {device.why for device in first if "agx" in device.kind} == {"warm-up: every module alike"}

    then = plan_fleet(config, resident, measure=True)
    small, large = ([device for device in then if kind in device.kind] for kind in ("tx2", "agx"))
    assert all("bound by memory" in device.why for device in small)
    assert sum(small[0].ranks.values()) < sum(large[0].ranks.values())
    for device in then:
        shapes = resident.spec.shapes
        assert shapes is not None
        step = workload(config).step(device.ranks, causal=True, batch=device.batch, bits=device.bits)
        assert device.memory == memory(shapes, step).total <= device.lends


def test_the_answer_that_stands_for_a_device_repeats_its_own_task(
    pipe: tuple[RunConfig, Resident], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, resident = pipe
    heard: list[Update] = []
    merge = FedPipe.aggregate

    def listen(self: FedPipe, state: State, updates: Iterable[Update]) -> State:
        heard.extend(updates)
        return merge(self, state, heard)

    monkeypatch.setattr(FedPipe, "aggregate", listen)
    first = plan_fleet(config, resident)
    plan_fleet(config, resident, measure=True)
    whole, steps = config.train.batch_size, config.train.steps
    assert len({device.batch for device in first}) > 1
    assert [update.metrics[PASSES] for update in heard] == [steps * (whole // device.batch) for device in first]
    assert [update.metrics[NEED] for update in heard] == [device.memory for device in first]


def test_a_recipe_that_describes_nothing_is_planned_too(pipe: tuple[RunConfig, Resident]) -> None:
    """Bytes and memory by hand: one matrix of rank r has r (d_out + d_in) numbers."""
    config = build_config({"fleet": {"devices": 3, "ranks": [8, 2]}, "wire": {"up": "fp16"}})
    resident = _resident(config)
    assert resident.spec.shapes is None
    planned = plan_fleet(config, resident)
    sides = sum(matrix.d_out + matrix.d_in for matrix in resident.spec.matrices.values())
    assert [device.up for device in planned] == [2 * 8 * sides, 2 * 2 * sides, 2 * 8 * sides]
    assert {device.down for device in planned} == {4 * 16 * sides}  # ranks 8 + 2 + 8, cut to the cap
    assert [(device.rank, device.why, device.seconds) for device in planned] == [
        (rank, "all it may have", None) for rank in (8, 2, 8)
    ]
    tight = config.model_copy(update={"fleet": config.fleet.model_copy(update={"memory_mb": (30.0,)})})
    assert all("runs out of memory" in device.why for device in plan_fleet(tight, resident))
    shared = plan_fleet(
        build_config({"fleet": {"devices": 2, "ranks": [8, 2]}, "strategy": {"name": "fedit"}}), resident
    )
    assert [device.rank for device in shared] == [2, 2]
    assert "share" in shared[0].why
    numbers = plan_fleet(build_config({"fleet": {"devices": 1}, "strategy": {"name": "sketch", "k": 64}}), resident)
    assert (numbers[0].memory, numbers[0].up, numbers[0].why) == (None, None, "64 numbers, whatever its rank")


def test_the_table_groups_alike_devices_and_json_has_each(fedloom: Fedloom) -> None:
    code, out, _ = fedloom("plan", "fedspine", "--set", "fleet.devices=8")
    text = " ".join(out.split())
    assert code == 0
    assert "3 x jetson" in text
    assert "its schedule leaves ratios 0.001 to 0.001" in text  # the first round's
    assert "a step on the whole model at rank 8, batch 4, 64 tokens: 27.8 MB" in text
    code, out, _ = fedloom("plan", "fedspine", "--set", "fleet.devices=8", "--round", 3, "--json")
    (plan,) = json.loads(out)
    devices: list[dict[str, Any]] = plan["devices"]
    assert (code, plan["round"], len(devices)) == (0, 3, 8)
    assert devices[0].keys() >= {"device", "rank", "ratio", "bits", "batch", "memory", "seconds", "down", "up", "why"}


def test_the_guide_shows_the_real_table(fedloom: Fedloom, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/unequal-devices.md holds what `COLUMNS=132 fedloom plan fedspine` prints, and names commands that exist."""
    page = GUIDE.read_text(encoding="utf-8")
    shown = re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0]
    monkeypatch.setenv("COLUMNS", "132")
    code, out, _ = fedloom("plan", "fedspine")
    assert (code, [line.rstrip() for line in out.splitlines()]) == (0, shown.splitlines())
    commands = set(re.findall(r"fedloom (?:plan|run|strategies) (\S+)", page))
    assert {name.strip("`") for name in commands} == {"fedspine", "fedpipe"}
    options = {row["option"] for name in ("fedspine", "fedpipe") for row in _options(fedloom, name)}
    assert {"target", "ramp", "pace", "half", "warmup_rank"} <= options


def _options(fedloom: Fedloom, name: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = json.loads(fedloom("strategies", name, "--json")[1])
    return rows


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fedspin"], "no recipe 'fedspin': did you mean 'fedspine'?"),
        (["fedspine", "--round", "99"], "a round must be in 1..8 (recipe key 'server.rounds'), got 99"),
        (["fedspine", "--measure"], "only fedpipe has a warm-up to measure, got strategy 'fedspine'"),
        (["fedspine", "--set", "model.describe=nothing"], "set model.describe"),
        (["fedspine", "--set", "fleet.memory_mb=[3]"], "device-00"),
        (["fedspine", "--set", "fleet.profiles=['jetson-tx3']"], "unknown device profile 'jetson-tx3'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    fedloom: Fedloom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = fedloom("plan", *arguments)
    assert code == 2
    assert line in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []
