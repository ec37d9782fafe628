"""Who takes part: devices of another model, devices that no task fits, refusals that are true, old or forged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message, RecordDict
from weather import CrashAt, CrashError, Weather, config, final, go, write_table

from fedloom.protocols.codec import decode, encode
from fedloom.protocols.config import RunConfig
from fedloom.protocols.messages import DeviceReport, Hello, ModelSpec, Refusal, Task
from fedloom.server.courier import to_reply
from fedloom.server.dashboard.folder import RunFolder
from fedloom.server.dashboard.state import RunState, Standing
from fedloom.server.events import EVENTS_FILE, EventLog
from fedloom.server.greeting import muster
from fedloom.server.watch import Silent

LIMIT = 2**29


@pytest.fixture
def table(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return write_table(tiny_llama, tmp_path)


class Told(Silent):
    """Remembers who was left out, and what was refused."""

    def __init__(self) -> None:
        self.left: list[tuple[str, str]] = []
        self.refused: list[tuple[int, str, str]] = []

    def left_out(self, *, device: str, reason: str) -> None:
        self.left.append((device, reason))

    def answered(self, **about: Any) -> None:
        if about["refused"]:
            self.refused.append((about["round"], about["device"], about["refused"]))


def changed(nodes: set[int], base: str = "f" * 64, **report: Any) -> Callable[[str, int, bytes], bytes]:
    """Devices that say of themselves what they are not."""

    def bend(kind: str, node: int, frame: bytes) -> bytes:
        if kind != "query" or node not in nodes:
            return frame
        hello = decode(frame, Hello, limit=LIMIT)
        spec = replace(hello.spec, base_hash=base) if base else hello.spec
        return encode(Hello(report=replace(hello.report, **report), spec=spec))

    return bend


def on_the_page(out: Path) -> RunState:
    folder = RunFolder(out)
    while folder.poll()[1]:
        continue
    return folder.run


def test_a_device_of_another_base_is_left_out(table: dict[str, Any], tmp_path: Path) -> None:
    """It is refused, named on the page, and asked again, but stops nobody."""
    recipe = config(table)
    grid, out = Weather(recipe, tmp_path / "devices"), tmp_path / "run"
    grid.bend = changed({1})
    log = EventLog(out / EVENTS_FILE)
    history = go(grid, recipe, out, log)
    log.close()
    assert [record.get("updates") for record in history] == [None, 4, 4]
    run = on_the_page(out)
    device = run.devices["device-00"]
    assert device.standing == Standing.LEFT_OUT
    assert device.why.startswith("it must hold the run's base and targets, ")
    assert device.why.endswith("got ffffffffffff (14 adapted matrices)")
    assert [(incident.device, incident.greeting) for incident in run.incidents] == [("device-00", True)]
    assert grid.asked.count(("query", 1)) == 4  # before every round, too


def test_a_device_that_gets_the_right_base_is_taken_in(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table)
    grid = Weather(recipe, tmp_path / "devices")
    grid.bend = changed({3})

    class Mends(Silent):
        def ended(self, *, record: Any) -> None:
            grid.bend = changed(set())

    assert [record.get("updates") for record in go(grid, recipe, tmp_path / "run", Mends())] == [None, 5, 5]


def test_devices_that_all_differ_are_one_clear_error(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table)
    grid = Weather(recipe, tmp_path / "devices")
    grid.bend = lambda kind, node, frame: changed({node}, f"{node}" * 64)(kind, node, frame)
    match = r"more than half of the devices must hold the same base and targets, got 5: 'device-04' holds 5{12} \(14"
    with pytest.raises(ValueError, match=match):
        go(grid, recipe, tmp_path / "run")


def test_half_of_the_devices_is_not_enough() -> None:
    def hello(name: str, base: str) -> Hello:
        spec = ModelSpec(base_hash=base * 64, matrices={})
        return Hello(report=DeviceReport(device=name, examples=3, rank=2), spec=spec)

    two, told = {1: hello("a", "a"), 2: hello("b", "b")}, Told()
    with pytest.raises(ValueError, match="more than half of the devices must hold the same base"):
        muster(two, told)
    assert muster(two, told, prefer=hello("", "b").spec).spec.base_hash == "b" * 64
    assert [device for device, _ in told.left] == ["a"]
    assert len(muster(two | {3: hello("c", "a")}, told)) == 2


def test_a_resumed_run_goes_by_the_base_of_its_checkpoint(table: dict[str, Any], tmp_path: Path) -> None:
    """Even if most devices have another one by now."""
    recipe = config(table)
    with pytest.raises(CrashError):
        go(Weather(recipe, tmp_path / "devices"), recipe, tmp_path / "run", CrashAt(2, "train", 1))
    again, told = Weather(recipe, tmp_path / "devices"), Told()
    again.bend = changed({1, 2, 3})
    history = go(again, recipe, tmp_path / "run", told)
    assert [record["round"] for record in history] == [2]
    assert {device for device, _ in told.left} == {"device-00", "device-01", "device-02"}
    assert json.loads(final(tmp_path / "run")[1])["roster"]["device-00"][:2] == [1, 1]  # its place is kept


def weak(table: dict[str, Any], **changes: Any) -> RunConfig:
    """FFA shares one rank, which a device of rank 2 cannot train."""
    table["fleet"]["ranks"] = [8]
    return config(table, strategy__name="ffa", strategy__rank=8, **changes)


def test_a_device_that_no_task_fits_does_not_stop_the_start(table: dict[str, Any], tmp_path: Path) -> None:
    recipe, told = weak(table), Told()
    grid = Weather(recipe, tmp_path / "devices")
    grid.bend = changed({4}, "", rank=2)
    history = go(grid, recipe, tmp_path / "run", told)
    assert [record.get("updates") for record in history] == [None, 4, 4]
    assert told.left[0] == ("device-03", "device-03 must train the shared rank 8, got a largest rank of 2")
    assert "device-03" not in history[-1]["devices"]

    none = Weather(recipe, tmp_path / "others")
    none.bend = changed({1, 2, 3, 4, 5}, "", rank=2)
    with pytest.raises(ValueError, match="device-00 must train the shared rank 8, got a largest rank of 2"):
        go(none, recipe, tmp_path / "none")


def test_a_device_that_no_task_fits_any_more_does_not_stop_a_resume(table: dict[str, Any], tmp_path: Path) -> None:
    """Its owner has lowered its rank while the server was down."""
    recipe, told = weak(table), Told()
    with pytest.raises(CrashError):
        go(Weather(recipe, tmp_path / "devices"), recipe, tmp_path / "run", CrashAt(1, "evaluate", 2))
    again = Weather(recipe, tmp_path / "devices")
    again.bend = changed({4}, "", rank=2)
    history = go(again, recipe, tmp_path / "run", told)
    assert [record["updates"] for record in history] == [5, 4]  # it had trained for round 1, and that is in the journal
    assert ("device-03", "device-03 must train the shared rank 8, got a largest rank of 2") in told.left

    all_weak = Weather(recipe, tmp_path / "devices")
    all_weak.bend = changed({1, 2, 3, 4, 5}, "", rank=2)
    with pytest.raises(ValueError, match="must train the shared rank 8"):
        go(all_weak, recipe, tmp_path / "run")


@pytest.mark.parametrize(("reason", "told"), [("", "no reason given"), ("not today", "not today")])
def test_a_hello_that_is_refused_is_a_failure(table: dict[str, Any], tmp_path: Path, reason: str, told: str) -> None:
    recipe, watcher = config(table), Told()
    grid = Weather(recipe, tmp_path / "devices")
    no = encode(Refusal(device="device-01", round=0, reason=reason))
    grid.bend = lambda kind, node, frame: no if (kind, node) == ("query", 2) else frame
    history = go(grid, recipe, tmp_path / "run", watcher)
    assert [record.get("updates") for record in history] == [None, 4, 4]
    assert watcher.refused == [(0, "2", told)] * 4


def refusing(grid: Weather, node: int, reason: str, **changes: Any) -> Callable[[str, int, bytes], bytes]:
    """A device that says no to every training, in words that are its task's but for `changes`."""

    def bend(kind: str, at: int, frame: bytes) -> bytes:
        if (kind, at) != ("train", node):
            return frame
        task = decode(grid.sent["train", node][-1], Task, limit=LIMIT)
        named = {"device": task.device, "round": task.round, "run": task.run, "nonce": task.nonce, "version": 0}
        return encode(Refusal(reason=reason, **(named | changes)))

    return bend


def since(grid: Weather, kind: str, node: int) -> list[int | None]:
    """From which version a node was brought up to date, by each of its tasks."""
    patches = [decode(frame, Task, limit=LIMIT).patch for frame in grid.sent[kind, node]]
    return [patch and patch.since for patch in patches]


def test_not_now_is_no_failure(table: dict[str, Any], tmp_path: Path) -> None:
    """A device outside its hours is asked again each round, rests never, and is shown as what it is."""
    recipe = config(table, server__quarantine_after=1, server__quarantine_rounds=9, server__rounds=3)
    grid, out = Weather(recipe, tmp_path / "devices"), tmp_path / "run"
    grid.bend = refusing(grid, 2, "not now: this device works at 22:00-06:00 (local time) only")
    log = EventLog(out / EVENTS_FILE)
    history = go(grid, recipe, out, log)
    log.close()
    assert [record.get("updates") for record in history] == [None, 4, 4, 4]
    assert history[-1]["refused"] == 0
    assert grid.asked.count(("train", 2)) == 3
    run = on_the_page(out)
    assert list(run.incidents) == []
    events = [json.loads(line) for line in (out / EVENTS_FILE).read_text().splitlines() if line]
    before = RunState()
    for event in events:
        before.apply(event)
        if (event["event"], event.get("device"), event.get("phase")) == ("answer", "device-01", "train"):
            device = before.devices["device-01"]
            assert (device.standing, device.why) == (
                Standing.NOT_NOW,
                "this device works at 22:00-06:00 (local time) only",
            )
            assert device.total().refused == 0
    assert run.devices["device-01"].standing == Standing.ANSWERED  # evaluation is another matter


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"round": 1}, "a refusal's round must be its task's 2, got 1"),
        ({"device": "device-03"}, "a refusal's device must be its task's 'device-01', got 'device-03'"),
        ({"run": "another"}, "a refusal's run must be its task's 'run', got 'another'"),
        ({"nonce": 5}, "a refusal's nonce must be its task's"),
        ({"round": 0, "run": "", "nonce": 0}, "a refusal's run must be its task's 'run', got ''"),
    ],
)
def test_an_old_or_forged_refusal_says_nothing(
    table: dict[str, Any], tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    """It is an answer that is not taken: its version is not noted, and 'not now' excuses nobody."""
    recipe = config(table, server__quarantine_after=9)
    grid = Weather(recipe, tmp_path / "devices")

    class Watch(Told):
        def ended(self, *, record: Any) -> None:
            if record["round"] == 1:
                grid.bend = refusing(grid, 2, "not now: it is late", **changes)

    told = Watch()
    assert go(grid, recipe, tmp_path / "run", told)[-1]["refused"] == 1
    ((round, device, reason),) = told.refused
    assert (round, device) == (2, "device-01")
    assert reason.startswith(why)
    assert reason.endswith("; it said: not now: it is late")
    assert json.loads(final(tmp_path / "run")[1])["roster"]["device-01"] == [2, 1, 1, 0]  # it failed once
    assert since(grid, "evaluate", 2) == [None, 0, 1]


def test_a_true_refusal_says_what_the_device_holds(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table)
    grid = Weather(recipe, tmp_path / "devices")

    class Watch(Told):
        def ended(self, *, record: Any) -> None:
            if record["round"] == 1:
                grid.bend = refusing(grid, 2, "the data is gone")

    told = Watch()
    assert go(grid, recipe, tmp_path / "run", told)[-1]["refused"] == 1
    assert told.refused == [(2, "device-01", "the device declined: the data is gone")]
    assert since(grid, "evaluate", 2) == [None, 0, 0]  # it said that it holds nothing


def test_what_flower_says_of_a_failure_is_one_line() -> None:
    message = Message(RecordDict(), 1, "train")
    message.metadata.__dict__["_message_id"] = "1"
    failed = Message(Error(code=2, reason="Traceback:\n  File x\r\x1b[31m\u2028round 7: all is well"), reply_to=message)
    assert to_reply(failed, 1).error == "Flower error 2: Traceback: File x [31m round 7: all is well"


def test_the_log_tells_the_bytes_of_every_device(table: dict[str, Any], tmp_path: Path) -> None:
    """Both ways and over all phases, they are those of the ledger, for good answers and others."""
    recipe = config(table, server__cohort=3, server__over_select=1.6)
    grid, out = Weather(recipe, tmp_path / "devices"), tmp_path / "run"
    grid.bend = refusing(grid, 2, "no")
    log = EventLog(out / EVENTS_FILE)
    go(grid, recipe, out, log)
    log.close()
    ledger = json.loads(final(out)[1])["ledger"]
    totals = {name: device.total() for name, device in on_the_page(out).devices.items()}
    assert {name: [total.up, total.down] for name, total in totals.items()} == {
        name: entry[:2] for name, entry in ledger.items()
    }
    assert all(total.down for total in totals.values())
