"""The ServerApp of a deployed run, on the in-process grid: what Flower would call, without Flower's processes."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedloom.protocols.config import RunConfig, read_recipe
from fedloom.server import deployed
from fedloom.server.deployed import LOCK_FILE, run_in
from fedloom.server.enrolled import NODES_FILE, Enrolled, check_name, write_nodes
from fedloom.server.orders import Orders, read_orders, write_orders
from fedloom.server.processes import MARK, birth
from fedloom.server.standing import STANDING_FILE, Stage, read_standing
from fedloom.server.superlink import FOLDER
from fedloom.simulations.cookbook import find_recipe
from fedloom.simulations.grid import InProcessGrid, pretend_nodes
from fedloom.simulations.naming import run_name
from fedloom.simulations.runs import run_recipe
from fedloom.simulations.world import pretend_app

SMALL = ("fleet.devices=2", "server.rounds=2", "train.steps=1", "data.train_scale=0.1", "data.test_size=2")


class SlowGrid(InProcessGrid):
    """A grid whose second node connects after a number of looks."""

    looks = 0
    missing_for = 0

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        nodes = list(super().get_node_ids())
        return nodes if self.looks > self.missing_for else nodes[:1]


@pytest.fixture
def config() -> RunConfig:
    return read_recipe(find_recipe("quick"), (*SMALL, "track.tensorboard=false"))


def order(out: Path, config: RunConfig, **changes: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    orders = Orders(config=config, run=run_name(config), **{"wait_for": 2, **changes})
    write_orders(out, orders)
    (out / FOLDER).mkdir(exist_ok=True)
    write_nodes(out / FOLDER, dict(enumerate(orders.names or (), start=1)))


def grid_of(config: RunConfig, work: Path, missing_for: int = 0) -> SlowGrid:
    grid = SlowGrid(pretend_nodes(config.fleet.devices), pretend_app, (config, work))
    grid.missing_for = missing_for
    return grid


def events(out: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines() if line]


def test_orders_come_back_as_they_were_given(tmp_path: Path, config: RunConfig) -> None:
    orders = Orders(config=config, run="abc", wait_for=3, wait_seconds=5.0, rejoin_seconds=2.0, names=("a", "b"))
    write_orders(tmp_path, orders)
    assert read_orders(tmp_path) == orders
    for names in (None, ()):  # nobody has to be on a list, and nobody is on the list
        write_orders(tmp_path, replace(orders, names=names))
        assert read_orders(tmp_path).names == names


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"config": {}, "run": "x", "wait_for": "many"}'])
def test_bad_orders_are_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan.json cannot be read|invalid literal"):
        read_orders(tmp_path)


def test_a_run_waits_for_its_devices_and_ends_as_a_simulated_one(tmp_path: Path, config: RunConfig) -> None:
    out = tmp_path / "deployed"
    order(out, config)
    grid = grid_of(config, tmp_path / "work", missing_for=2)
    run_in(out, grid, 5)
    assert grid.looks >= 3
    standing = read_standing(out)
    assert standing is not None
    assert (standing.stage, standing.pid, standing.run_id) == (Stage.FINISHED, os.getpid(), 5)
    assert standing.born == birth(os.getpid())
    assert events(out)[-1] == "finished"

    run_recipe(config, tmp_path / "simulated")
    states = [
        (folder / "checkpoints" / "round-000002" / "state.safetensors").read_bytes()
        for folder in (out, tmp_path / "simulated")
    ]
    assert states[0] == states[1]


def test_too_few_devices_are_an_error_that_says_how_many(tmp_path: Path, config: RunConfig) -> None:
    order(tmp_path, config, wait_for=3, wait_seconds=0.3)
    with pytest.raises(ValueError, match=r"a run waits for 3 devices, got 2 within 0.3 s"):
        run_in(tmp_path, grid_of(config, tmp_path / "work"), 1)
    standing = read_standing(tmp_path)
    assert standing is not None
    assert (standing.stage, standing.kind) == (Stage.FAILED, "ValueError")
    assert standing.error == "a run waits for 3 devices, got 2 within 0.3 s"


def test_after_a_restart_it_waits_for_those_that_were_there_before(tmp_path: Path, config: RunConfig) -> None:
    order(tmp_path, config)
    run_in(tmp_path, grid_of(config, tmp_path / "work"), 1)
    longer = config.model_copy(update={"server": config.server.model_copy(update={"rounds": 3})})
    order(tmp_path, longer, wait_for=1, rejoin_seconds=30.0, names=("device-00", "device-01"))
    grid = grid_of(longer, tmp_path / "work", missing_for=4)
    run_in(tmp_path, grid, 2)
    assert grid.looks >= 5
    order(tmp_path, longer, wait_for=1, rejoin_seconds=30.0, names=("device-00",))  # the other's key is revoked
    grid = grid_of(longer, tmp_path / "work", missing_for=10**6)
    began = time.monotonic()
    run_in(tmp_path, grid, 3)
    assert time.monotonic() - began < 10


def test_a_device_that_stays_away_is_not_waited_for_forever(
    tmp_path: Path, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    order(tmp_path, config)
    run_in(tmp_path, grid_of(config, tmp_path / "work"), 1)
    longer = config.model_copy(update={"server": config.server.model_copy(update={"rounds": 3})})
    order(tmp_path, longer, wait_for=1, rejoin_seconds=0.5)
    run_in(tmp_path, grid_of(longer, tmp_path / "work", missing_for=10**6), 2)
    assert "going on with 1 of the 2 devices that took part before" in caplog.text
    assert (tmp_path / "checkpoints" / "round-000003").exists()


NAMES = ("device-00", "device-01")


def refused(out: Path) -> list[str]:
    found = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines() if line]
    return [event["refused"] for event in found if event["event"] == "answer" and event["refused"]]


def test_a_device_that_passes_for_another_is_left_out_also_after_a_restart(
    tmp_path: Path, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """The key of node 2 was given to mallory, who greets as device-01."""
    order(tmp_path, config, wait_for=1, rejoin_seconds=0.0, names=NAMES)
    write_nodes(tmp_path / FOLDER, {1: "device-00", 2: "mallory"})
    run_in(tmp_path, grid_of(config, tmp_path / "work"), 1)
    line = "its key was given to 'mallory', and it calls itself 'device-01'"
    assert set(refused(tmp_path)) == {line}
    assert f"node 2 is left out: {line}" in caplog.text
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["round"], last["updates"]) == (2, 1)

    longer = config.model_copy(update={"server": config.server.model_copy(update={"rounds": 3})})
    order(tmp_path, longer, wait_for=1, rejoin_seconds=0.0, names=NAMES)
    write_nodes(tmp_path / FOLDER, {1: "device-00", 2: "mallory"})
    run_in(tmp_path, grid_of(longer, tmp_path / "work"), 2)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["round"], last["updates"]) == (3, 1)


def test_a_node_on_nobodys_name_is_not_there(tmp_path: Path, config: RunConfig) -> None:
    order(tmp_path, config, wait_for=2, wait_seconds=0.3, names=NAMES)
    write_nodes(tmp_path / FOLDER, {1: "device-00"})
    with pytest.raises(ValueError, match=r"a run waits for 2 devices, got 1 within 0.3 s"):
        run_in(tmp_path, grid_of(config, tmp_path / "work"), 1)
    (tmp_path / FOLDER / NODES_FILE).unlink()
    with pytest.raises(ValueError, match=r"a run waits for 2 devices, got 0 within 0.3 s"):
        run_in(tmp_path, grid_of(config, tmp_path / "work"), 1)


def test_the_list_of_nodes_is_read_again_when_it_changes(tmp_path: Path) -> None:
    enrolled = Enrolled(tmp_path)
    assert enrolled.names() == {}
    for names in ({1: "a"}, {1: "a", 2**64 - 1: "b"}):
        write_nodes(tmp_path, names)
        assert enrolled.names() == names
    for text in ("", "[]", "{", '{"x": "a"}', "9" * 5000):
        (tmp_path / NODES_FILE).write_text(text)
        assert enrolled.names() == {}
    with pytest.raises(ValueError, match="its key was taken back, and it calls itself 'a'"):
        check_name("a", 1, {})
    check_name("a", 1, None)


def test_all_that_a_run_writes_is_for_its_user_alone(tmp_path: Path, config: RunConfig) -> None:
    """Whatever the umask is: updates in the journal, the model in checkpoints, names in the logs."""
    out = tmp_path / "open"
    mask = os.umask(0)
    try:
        order(out, config)
        out.chmod(0o777)
        run_in(out, grid_of(config, tmp_path / "work"), 1)
        assert os.umask(0) == 0  # as it was before
    finally:
        os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o700
    made = [path for path in out.rglob("*") if path.name not in ("plan.json", "nodes.json", FOLDER)]  # the test's own
    assert {"state.safetensors", "metrics.jsonl", "events.jsonl", "serverapp.json"} <= {path.name for path in made}
    assert [path.name for path in made if path.stat().st_mode & 0o077] == []


class DoubledGrid(SlowGrid):
    """A grid on which every node is the first device."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for node in self._nodes.values():
            node.node_config["partition-id"] = 0


def test_a_second_device_of_one_name_is_left_out_and_the_run_goes_on(
    tmp_path: Path, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """As it may be where there are no keys."""
    order(tmp_path, config)
    run_in(tmp_path, DoubledGrid(pretend_nodes(2), pretend_app, (config, tmp_path / "work")), 1)
    assert set(refused(tmp_path)) == {"device names must differ, got 'device-00' twice"}
    assert "is left out: device names must differ, got 'device-00' twice" in caplog.text
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["round"], last["updates"]) == (2, 1)


class LeavingGrid(SlowGrid):
    """A grid whose second node is away from the second look on, for a number of looks."""

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        nodes = list(self._nodes)
        return nodes[:1] if 1 < self.looks <= self.missing_for else nodes


def test_a_device_that_leaves_just_after_a_restart_is_waited_for(tmp_path: Path, config: RunConfig) -> None:
    order(tmp_path, config)
    run_in(tmp_path, grid_of(config, tmp_path / "work"), 1)
    longer = config.model_copy(update={"server": config.server.model_copy(update={"rounds": 3})})
    order(tmp_path, longer, wait_for=1, rejoin_seconds=30.0)
    grid = LeavingGrid(pretend_nodes(2), pretend_app, (longer, tmp_path / "work"))
    grid.missing_for = 6
    run_in(tmp_path, grid, 2)
    assert grid.looks >= 7
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (record["round"], record["updates"]) == (3, 2)


def test_two_never_work_in_one_folder(tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    order(tmp_path, config)
    with (tmp_path / LOCK_FILE).open("a") as earlier:
        fcntl.flock(earlier, fcntl.LOCK_EX)
        monkeypatch.setattr(deployed, "LOCK_SECONDS", 0.3)
        with pytest.raises(ValueError, match="must be free, an earlier ServerApp still works on it"):
            run_in(tmp_path, grid_of(config, tmp_path / "work"), 1)
        assert not (tmp_path / STANDING_FILE).exists()
        monkeypatch.setattr(deployed, "LOCK_SECONDS", 30.0)
        threading.Timer(0.5, fcntl.flock, (earlier, fcntl.LOCK_UN)).start()
        run_in(tmp_path, grid_of(config, tmp_path / "work"), 1)
    assert (tmp_path / "checkpoints" / "round-000002").exists()


def test_the_folder_comes_from_the_run_or_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MARK, raising=False)
    context: Any = SimpleNamespace(run_config={"plan": ""})
    with pytest.raises(ValueError, match="must be told its folder"):
        deployed._out_of(context)
    monkeypatch.setenv(MARK, "/runs/mine")
    assert deployed._out_of(context) == Path("/runs/mine")
    context.run_config["plan"] = "/runs/joined"
    assert deployed._out_of(context) == Path("/runs/joined")


def test_a_run_that_has_begun_goes_on_when_a_device_leaves_at_once(tmp_path: Path, config: RunConfig) -> None:
    """Also with fewer than it waited for to begin with: its key may have been taken back."""

    class Leaves(SlowGrid):
        def get_node_ids(self) -> Iterable[int]:
            nodes = list(super().get_node_ids())
            return nodes if self.looks < 3 else nodes[:1]

    order(tmp_path, config, wait_for=2, wait_seconds=60.0, rejoin_seconds=1.0)
    began = time.monotonic()
    run_in(tmp_path, Leaves(pretend_nodes(2), pretend_app, (config, tmp_path / "work")), 1)
    assert time.monotonic() - began < 45
    assert (tmp_path / "checkpoints" / "round-000002").exists()
