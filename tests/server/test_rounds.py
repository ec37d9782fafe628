"""Rounds under bad weather: crashes in the middle, devices that are slow, silent, late, away or wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from weather import DEVICES, CrashAt, CrashError, Weather, config, final, go, write_table

from fedloom.server.events import EVENTS_FILE, EventLog
from fedloom.server.loop import JOURNAL, TooFew
from fedloom.server.watch import Silent


@pytest.fixture
def table(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return write_table(tiny_llama, tmp_path)


@pytest.mark.parametrize("phase", ["train", "evaluate"])
@pytest.mark.parametrize("answers", [1, 3, 5])
def test_a_killed_round_goes_on_with_the_answers_it_had(
    table: dict[str, Any], tmp_path: Path, phase: str, answers: int
) -> None:
    """The same bytes as a run that was never cut, and no device is asked twice, whoever was slow before and after."""
    recipe = config(table)
    cut = Weather(recipe, tmp_path / "devices")
    cut.slow = {1, 4}
    with pytest.raises(CrashError):
        go(cut, recipe, tmp_path / "cut", CrashAt(1, phase, answers))
    again = Weather(recipe, tmp_path / "devices")
    again.slow = {2}
    go(again, recipe, tmp_path / "cut")
    asked = [node for kind, node in again.asked if kind == phase]
    assert len(asked) == DEVICES * 2 - answers  # round 0 was evaluated before the cut
    go(Weather(recipe, tmp_path / "others"), recipe, tmp_path / "whole")
    assert final(tmp_path / "cut") == final(tmp_path / "whole")
    assert not (tmp_path / "cut" / JOURNAL).exists()


def test_a_damaged_answer_in_the_journal_is_asked_for_again(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table)
    with pytest.raises(CrashError):
        go(Weather(recipe, tmp_path / "devices"), recipe, tmp_path / "cut", CrashAt(1, "train", 4))
    frames = sorted((tmp_path / "cut" / JOURNAL / "round-000001-train").glob("*.frame"))
    assert len(frames) == 4
    data = bytearray(frames[0].read_bytes())
    data[-1] ^= 1
    frames[0].write_bytes(data)
    frames[1].write_bytes(b"x")
    again = Weather(recipe, tmp_path / "devices")
    go(again, recipe, tmp_path / "cut")
    assert len([node for kind, node in again.asked if kind == "train"]) == DEVICES * 2 - 2
    go(Weather(recipe, tmp_path / "others"), recipe, tmp_path / "whole")
    assert final(tmp_path / "cut") == final(tmp_path / "whole")


def test_a_round_ends_with_its_first_good_answers(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table, server__cohort=3, server__over_select=1.6, server__timeout=0.5, eval__every=0)
    grid = Weather(recipe, tmp_path / "devices")
    began: list[Any] = []
    unneeded: list[tuple[int, str]] = []

    class Watch(Silent):
        def began(self, **about: Any) -> None:
            began.append((about["phase"], len(about["devices"])))

        def unneeded(self, **about: Any) -> None:
            unneeded.append((about["round"], about["device"]))
            assert about["down"] == len(grid.sent["train", int(about["device"][-2:]) + 1][about["round"] - 1])

        def ended(self, *, record: Any) -> None:
            grid.silent = {2}

    history = go(grid, recipe, tmp_path / "run", Watch())
    assert began.count(("train", 5)) == 2
    assert [record["updates"] for record in history[1:]] == [3, 3]
    assert history[1]["refused"] == 0  # device-01 never answered, and nobody waited for it
    assert history[2]["refused"] == 1  # but it was asked to evaluate at the end
    assert [round for round, _ in unneeded] == [1, 1, 2, 2]
    assert (2, "device-01") in unneeded
    roster = json.loads(final(tmp_path / "run")[1])["roster"]
    assert {name: values[2:] for name, values in roster.items()} == {f"device-0{n}": [0, 0] for n in range(DEVICES)}


def test_a_silent_device_is_waited_for_as_long_as_the_recipe_says_and_then_rests(
    table: dict[str, Any], tmp_path: Path
) -> None:
    recipe = config(table, server__timeout=0.3, server__quarantine_after=1, server__quarantine_rounds=1, eval__every=0)
    grid = Weather(recipe, tmp_path / "devices")
    grid.away = set()
    out, log = tmp_path / "run", EventLog(tmp_path / "run" / EVENTS_FILE)

    class Watch(EventLog):
        def ended(self, *, record: Any) -> None:
            super().ended(record=record)
            grid.silent = {3} if record["round"] == 0 else set()

    log.close()
    history = go(grid, recipe, out, Watch(out / EVENTS_FILE))
    assert [record["updates"] for record in history[1:]] == [4, 4]
    assert history[-1]["refused"] == 1
    events = [json.loads(line) for line in (out / EVENTS_FILE).read_text().splitlines() if line]
    (rest,) = [event for event in events if event["event"] == "quarantined"]
    assert (rest["device"], rest["until"]) == ("device-02", 2)
    assert rest["reason"] == "no answer within 0.3 s"
    assert [event["event"] for event in events if event["event"] in ("started", "round")] == ["started"] + ["round"] * 3
    assert len([event for event in events if event["event"] == "joined"]) == DEVICES


def test_a_round_with_too_few_answers_is_tried_again(table: dict[str, Any], tmp_path: Path) -> None:
    rules = {"server__timeout": 0.3, "server__min_updates": 5, "server__retries": 2, "server__retry_seconds": 0.0}
    recipe = config(table, eval__every=0, **rules)
    grid = Weather(recipe, tmp_path / "devices")

    class Recovers(Silent):
        def ended(self, *, record: Any) -> None:
            grid.silent = {3} if record["round"] == 0 else set()

        def answered(self, **about: Any) -> None:
            if about["refused"]:
                grid.silent = set()

    history = go(grid, recipe, tmp_path / "run", Recovers())
    assert [record["updates"] for record in history[1:]] == [5, 5]
    assert len([node for kind, node in grid.asked if kind == "train"]) == 11  # four answers of round 1 were kept
    assert history[-1]["bytes_down"] == sum(len(frame) for frames in grid.sent.values() for frame in frames)

    grid = Weather(recipe, tmp_path / "others")

    class NeverRecovers(Silent):
        def ended(self, *, record: Any) -> None:
            grid.silent = {3}

    with pytest.raises(TooFew, match=r"at least 5 good updates, got 4; the first refusal: device-02: no answer"):
        go(grid, recipe, tmp_path / "short", NeverRecovers())


def test_a_device_that_joins_late_is_brought_up_to_date(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table, server__rounds=3)
    grid = Weather(recipe, tmp_path / "devices")
    grid.away = {4}

    class Opens(Silent):
        def ended(self, *, record: Any) -> None:
            grid.away = {4} if record["round"] < 1 else set()

    history = go(grid, recipe, tmp_path / "run", Opens())
    assert [record.get("updates") for record in history] == [None, 4, 5, 5]
    assert history[-1]["refused"] == 0
    assert "device-03" in history[-1]["devices"]


def test_a_device_that_goes_away_is_left_out_until_it_is_back(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table, server__rounds=3)
    grid = Weather(recipe, tmp_path / "devices")

    class Leaves(Silent):
        def ended(self, *, record: Any) -> None:
            grid.away = {2} if record["round"] == 1 else set()

    history = go(grid, recipe, tmp_path / "run", Leaves())
    assert [record.get("updates") for record in history] == [None, 5, 4, 5]
    assert history[-1]["refused"] == 0


def test_a_garbled_answer_is_refused_and_the_round_goes_on(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table)
    grid = Weather(recipe, tmp_path / "devices")
    told: list[str] = []

    class Watch(Silent):
        def ended(self, *, record: Any) -> None:
            grid.garbled = {1}

        def answered(self, **about: Any) -> None:
            if about["refused"]:
                told.append(about["refused"])

    history = go(grid, recipe, tmp_path / "run", Watch())
    assert [record.get("updates") for record in history] == [None, 4, 4]
    assert history[-1]["refused"] == len(told) == 4  # training and evaluation of two rounds
    assert all("checksum" in reason or "damaged" in reason for reason in told)


def test_a_full_disk_is_one_clear_line(table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = config(table)
    grid = Weather(recipe, tmp_path / "devices")
    out = tmp_path / "run"

    class Fills(Silent):
        def ended(self, *, record: Any) -> None:
            if record["round"] == 1:
                monkeypatch.setattr("fedloom.server.disk.os.fsync", full)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"No space left on device: make room and start again, nothing"):
        go(grid, recipe, out, Fills())
    monkeypatch.undo()
    go(Weather(recipe, tmp_path / "devices"), recipe, out)
    go(Weather(recipe, tmp_path / "others"), recipe, tmp_path / "whole")
    assert final(out) == final(tmp_path / "whole")


def test_buffered_rounds_do_not_wait_and_age_weighs(table: dict[str, Any], tmp_path: Path) -> None:
    """Five devices, at least three updates a round: a device that was slow at first comes two versions late."""
    recipe = config(table, server__mode="buffered", server__buffer=3, server__rounds=6, eval__every=3)
    grid = Weather(recipe, tmp_path / "devices")

    class SlowAtFirst(Silent):
        def ended(self, *, record: Any) -> None:
            grid.slow = {2} if record["round"] < 2 else set()

    history = go(grid, recipe, tmp_path / "run", SlowAtFirst())
    assert [record["updates"] for record in history[1:]] == [4, 4, 5, 5, 5, 5]  # all that one poll finds
    assert [record["staleness"] for record in history[1:]] == [0, 0, 2 / 5, 0, 0, 0]
    assert history[-1]["refused"] == 0
    assert history[-1]["evaluation"]["loss"] < history[0]["evaluation"]["loss"]
    assert [node for kind, node in grid.asked if kind == "train"].count(2) == 4  # not asked again while it was busy


def test_buffered_rounds_go_on_after_a_crash(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table, server__mode="buffered", server__buffer=2, server__rounds=4, eval__every=2)
    with pytest.raises(CrashError):
        go(Weather(recipe, tmp_path / "devices"), recipe, tmp_path / "run", CrashAt(3, "train", 1))
    history = go(Weather(recipe, tmp_path / "devices"), recipe, tmp_path / "run")
    assert [record["round"] for record in history] == [3, 4]
    rounds = [json.loads(line)["round"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rounds == [0, 1, 2, 3, 4]


def test_averages_of_weights_are_not_buffered(table: dict[str, Any], tmp_path: Path) -> None:
    recipe = config(table, server__mode="buffered", strategy__name="fedit")
    with pytest.raises(
        ValueError, match=r"needs a strategy of changes \(fedloom, flora, fedkseed, sketch\), got 'fedit'"
    ):
        go(Weather(recipe, tmp_path / "devices"), recipe, tmp_path / "run")


def test_a_late_device_that_no_task_fits_stays_out(table: dict[str, Any], tmp_path: Path) -> None:
    """FFA shares one rank; a device that cannot train it would stop the round that plans for it."""
    table["fleet"]["ranks"] = [8, 8, 8, 2, 8]
    recipe = config(table, strategy__name="ffa", strategy__rank=8)
    grid = Weather(recipe, tmp_path / "devices")
    grid.away = {4}

    class Opens(Silent):
        def ended(self, *, record: Any) -> None:
            grid.away = set()

    history = go(grid, recipe, tmp_path / "run", Opens())
    assert [record.get("updates") for record in history] == [None, 4, 4]
    assert "device-03" not in history[-1]["devices"]


@pytest.mark.parametrize(("least", "silent"), [(5, set()), (4, {3})])
def test_a_round_that_is_tried_again_takes_in_who_has_come(
    table: dict[str, Any], tmp_path: Path, least: int, silent: set[int]
) -> None:
    """Its first plan is in the journal, and is not all that a retry goes by: too few were here, or one was silent."""
    rules = {"server__timeout": 0.3, "server__min_updates": least, "server__retries": 1, "server__retry_seconds": 0.0}
    recipe = config(table, eval__every=0, **rules)

    class Late(Weather):
        looks = 0

        def get_node_ids(self) -> Iterable[int]:
            self.looks += 1  # at the start, before rounds 0 and 1, and before the second try
            return [node for node in super().get_node_ids() if node != 5 or self.looks > 3]

    grid = Late(recipe, tmp_path / "devices")

    class Watch(Silent):
        def ended(self, *, record: Any) -> None:
            grid.silent = silent

    history = go(grid, recipe, tmp_path / "run", Watch())
    assert [record.get("updates") for record in history] == [None, least, least]
    assert history[-1]["bytes_down"] == sum(len(frame) for frames in grid.sent.values() for frame in frames)


def test_an_answer_of_a_device_that_has_gone_since_is_used(table: dict[str, Any], tmp_path: Path) -> None:
    """It is in the journal when the server comes back, and the device does not."""
    recipe = config(table)
    with pytest.raises(CrashError):
        go(Weather(recipe, tmp_path / "devices"), recipe, tmp_path / "run", CrashAt(1, "train", 5))
    again = Weather(recipe, tmp_path / "devices")
    again.away = {5}
    history = go(again, recipe, tmp_path / "run")
    assert [record["updates"] for record in history] == [5, 4]
    roster = json.loads(final(tmp_path / "run")[1])["roster"]
    assert roster["device-04"][:2] == [0, 1]  # it trained in round 1 and was brought to no later version
