"""A disk that is really full, and files that are damaged: one clear line, no wrong state, in the end the same bytes.

The disks are small tmpfs, so root alone can run those; where nobody may mount one, they are skipped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from common import kill
from flwr.app import Message
from small_disk import small_disk
from stand import PRETEND, Stand, answers, final_state

from fedloom.protocols.config import RunConfig, read_recipe
from fedloom.server.checkpoint import latest_checkpoint
from fedloom.server.deployed import run_in
from fedloom.server.journal import Entry, Journal
from fedloom.server.orders import Orders, write_orders
from fedloom.server.standing import Stage, read_standing
from fedloom.simulations.cookbook import find_recipe
from fedloom.simulations.grid import InProcessGrid, pretend_nodes
from fedloom.simulations.naming import run_name
from fedloom.simulations.world import pretend_app

SMALL = ("fleet.devices=2", "server.rounds=3", "train.steps=1", "data.train_scale=0.1", "data.test_size=2")
FULL = "must have room for the run's files, got"
CURE = "make room and start again, nothing that was finished is lost"
PATIENT = 600.0  # seconds


# In one process: what the ServerApp does


class CutGrid(InProcessGrid):
    """Pretend devices; something happens as the n-th answer of training comes in."""

    def __init__(self, config: RunConfig, work: Path, at: int = 0, then: Callable[[], None] = lambda: None) -> None:
        super().__init__(pretend_nodes(config.fleet.devices), pretend_app, (config, work))
        self._left, self._then = at, then

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        for message in found:
            if message.metadata.message_type == "train":
                self._left -= 1
                if self._left == 0:
                    self._then()
        return found


class CrashError(Exception):
    """A pretend crash."""


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return read_recipe(find_recipe("quick"), (*SMALL, "eval.every=0", "track.tensorboard=false"))


def order(out: Path, config: RunConfig) -> None:
    out.mkdir(parents=True)
    write_orders(out, Orders(config=config, run=run_name(config), wait_for=2))


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The final state of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    order(folder / "run", config)
    run_in(folder / "run", CutGrid(config, folder / "work"), 1)
    return final_state(folder / "run")


def rounds(out: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("at", "left"),
    [(3, 0), (3, 3 << 12), (4, 0), (4, 900_000), (4, 2_500_000)],
    ids=["first answer", "half an answer", "second answer", "half a checkpoint", "nearly a checkpoint"],
)
def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_from_there(
    config: RunConfig, whole: bytes, tmp_path: Path, at: int, left: int
) -> None:
    with small_disk(tmp_path / "disk", megabytes=32) as disk:
        out = disk.folder / "run"
        order(out, config)
        grid = CutGrid(config, tmp_path / "work", at, lambda: disk.fill(but=left))
        for number in (1, 2):  # and once more, while it is still full
            with pytest.raises(ValueError, match=f"{FULL} No space left on device: {CURE}"):
                run_in(out, grid, number)
            standing = read_standing(out)
            assert standing is not None
            assert (standing.run_id, standing.stage, standing.kind) == (number, Stage.FAILED, "ValueError")
            assert CURE in standing.error
            checkpoint, complaints = latest_checkpoint(out / "checkpoints")
            assert checkpoint is not None
            assert (checkpoint.round, complaints) == (1, [])
            assert list(out.rglob(".*draft*")) == []  # half a file would be in the way of who makes room
        disk.make_room()
        run_in(out, grid, 3)
        assert final_state(out) == whole
        assert rounds(out) == [0, 1, 2, 3]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["state.safetensors", "run.json"])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_counts(
    config: RunConfig,
    whole: bytes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    out = tmp_path / "run"
    crash(out, config, tmp_path / "work", at=5)
    damage(out / "checkpoints/round-000002" / name)
    with caplog.at_level(logging.WARNING, logger="fedloom.server"):
        run_in(out, CutGrid(config, tmp_path / "work"), 2)
    assert "going back to the one before" in caplog.text
    assert final_state(out) == whole
    assert rounds(out) == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_answer_is_asked_for_again(
    config: RunConfig, whole: bytes, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "run"
    crash(out, config, tmp_path / "work", at=4)
    [answer] = (out / "journal/round-000002-train").glob("*.frame")
    damage(answer)
    run_in(out, CutGrid(config, tmp_path / "work"), 2)
    assert final_state(out) == whole


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_plan_says_what_to_do(
    config: RunConfig, whole: bytes, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out = tmp_path / "run"
    crash(out, config, tmp_path / "work", at=4)
    damage(out / "journal/round-000002-train/plan.json")
    with pytest.raises(ValueError, match=r"plan\.json cannot be read: .*; delete the folder to ask its devices again"):
        run_in(out, CutGrid(config, tmp_path / "work"), 2)
    for path in (out / "journal/round-000002-train").iterdir():
        path.unlink()
    run_in(out, CutGrid(config, tmp_path / "work"), 3)
    assert final_state(out) == whole


def test_the_bytes_of_a_task_are_not_believed_when_they_are_damaged(tmp_path: Path) -> None:
    journal = Journal(tmp_path, round=1, kind="train")
    journal.plan([])
    journal.put("a", Entry(down=1234, frame=b"frame"))
    assert journal.get("a") == Entry(down=1234, frame=b"frame")
    [path] = tmp_path.rglob("*.frame")
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)
    assert journal.get("a") is None


def crash(out: Path, config: RunConfig, work: Path, *, at: int) -> None:
    """A run that is cut as the n-th answer of training has come."""

    def die() -> None:
        raise CrashError

    order(out, config)
    with pytest.raises(CrashError):
        run_in(out, CutGrid(config, work, at, die), 1)


# For real: a server, agents, TLS and keys


def ends_full(stand: Stand) -> None:
    """Wait for the server to end with one line that says what to do."""
    code = stand.wait(
        lambda: [stand.processes["server"].poll()] if stand.processes["server"].poll() is not None else None,
        seconds=PATIENT,
        label="the server to end",
    )
    last = stand.log("server", 1)
    assert (code, FULL in last, CURE in last) == ([2], True, True), stand.log("server")
    print(last)


def reached(stand: Stand, round: int, good: int) -> Callable[[], bool]:
    """Whether the tasks of a round are out and so many good answers in; -1: whether its checkpoint is being written."""

    def now() -> bool:
        if good < 0:
            return any((stand.out / "checkpoints").glob(f"*-{round:06d}"))
        events = stand.events()
        begun = any(e["event"] == "phase" and (e["round"], e["phase"]) == (round, "train") for e in events)
        return begun and len(list(answers(events, round, "train"))) >= good

    return now


@pytest.mark.deploy
def test_a_servers_disk_that_fills_in_every_phase_costs_nothing(tmp_path: Path) -> None:
    phases = [(1, 0), (2, 1), (3, -1)]
    with small_disk(tmp_path / "disk", megabytes=64) as disk:
        changes = {"server": {"rounds": 4, "timeout": PATIENT}}
        stand = Stand(tmp_path / "stand", devices=2, known=PRETEND, changes=changes, out=disk.folder / "run")
        with stand:
            stand.start()
            for round, good in phases:
                stand.wait(reached(stand, round, good), seconds=PATIENT, pause=0.001, label=f"round {round}")
                disk.fill()
                ends_full(stand)
                stand.start_server()
                ends_full(stand)  # once more: it is still full
                checkpoint, complaints = latest_checkpoint(stand.out / "checkpoints")
                assert checkpoint is not None
                assert checkpoint.round in (round - 1, round)
                assert complaints == []
                disk.make_room()
                stand.start_server()
            stand.wait_to_finish(2 * PATIENT)
            assert "Traceback" not in stand.log("server", 10_000)
            assert rounds(stand.out) == [0, 1, 2, 3, 4]
            assert stand.final_state() == stand.simulated(tmp_path / "simulated")


@pytest.mark.deploy
def test_a_devices_disk_that_fills_keeps_it_out_until_there_is_room(tmp_path: Path) -> None:
    """Nothing leaves that cannot be logged; the round is tried again until the device can answer."""
    name = PRETEND[1]
    rules = {"min_updates": 2, "retries": 500, "retry_seconds": 1.0, "quarantine_after": 0}
    changes = {"server": {"rounds": 3, "timeout": PATIENT, **rules}}
    with (
        small_disk(tmp_path / "disk", megabytes=32) as disk,
        Stand(tmp_path / "stand", devices=2, known=PRETEND, changes=changes) as stand,
    ):
        settings = stand.folder / f"{name}.toml"
        text = settings.read_text().replace(str(stand.folder / "state" / name), str(disk.folder / "state"))
        settings.write_text(text)
        stand.start()
        stand.wait(reached(stand, 1, 2), seconds=PATIENT, label="round 1")
        disk.fill()

        def refused() -> list[str]:
            events = [e for e in stand.events() if e["event"] == "answer" and e["device"] == name]
            return [e["refused"] for e in events if e["refused"]]

        stand.wait(refused, seconds=PATIENT, label="the device to say that its disk is full")
        assert "the device cannot log what it sends: its disk fails" in refused()[0]
        cure = f"{disk.folder}/state must have room for the log of what leaves, got No space left on device: make room"
        assert cure in stand.log(name, 200)
        stand.kill(name)  # it starts again on the full disk
        cause = "the link to the server cannot be started: No space left on device"
        stand.wait(lambda: cause in stand.log(name, 200), seconds=PATIENT, label="the device's line after its restart")
        assert stand.processes[name].poll() is None  # and tries again
        assert "Traceback" not in stand.log(name, 10_000)
        disk.make_room()
        stand.wait_to_finish(2 * PATIENT)
        assert stand.final_state() == stand.simulated(tmp_path / "simulated")


@pytest.mark.deploy
def test_a_checkpoint_and_an_answer_that_are_damaged_while_the_server_is_down_change_nothing(tmp_path: Path) -> None:
    changes = {"server": {"rounds": 4, "timeout": PATIENT}}
    with Stand(tmp_path / "stand", devices=2, known=PRETEND, changes=changes) as stand:
        stand.start()
        for round, damage in ((2, flip), (3, cut)):
            stand.wait(reached(stand, round, 1), seconds=PATIENT, pause=0.005, label=f"an answer in round {round}")
            kill(stand.find("server"))
            stand.processes["server"].wait()
            newest = sorted((stand.out / "checkpoints").glob("round-*"))[-1]
            damage(newest / ("state.safetensors" if damage is flip else "run.json"))
            for answer in (stand.out / "journal").rglob("*.frame"):
                damage(answer)
            stand.start_server()
            said = f"checkpoint {newest} cannot be read"
            stand.wait(lambda said=said: said in stand.log("server", 200), seconds=PATIENT, label="word of the damage")
            assert "going back to the one before" in stand.log("server", 200)
        stand.wait_to_finish(2 * PATIENT)
        assert stand.final_state() == stand.simulated(tmp_path / "simulated")
